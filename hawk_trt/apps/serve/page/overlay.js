// Tokens over an image: which are kept, or how they score.

// Dark violet to yellow, evenly spaced and readable without colour vision.
const RAMP = [
  [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140],
  [40, 174, 128], [94, 201, 98], [173, 220, 48], [253, 231, 37],
];

/**
 * The panels of an image: the image itself and, where it was cut into tiles, the whole once more.
 * A panel is { columns, rows, tokens }: the token index of each cell, row by row.
 */
export function panelsOf({ grid: [steps, height, width], tiles }) {
  const [across, down] = tiles ?? [1, 1];
  const panels = [panel(across * width, down * height, (x, y) => {
    const tile = Math.floor(y / height) * across + Math.floor(x / width);
    return (tile * height + (y % height)) * width + (x % width);
  })];
  for (let step = across * down; step < steps; step++) {
    panels.push(panel(width, height, (x, y) => (step * height + y) * width + x));
  }
  return panels;
}

function panel(columns, rows, tokenAt) {
  const tokens = [];
  each(columns, rows, (x, y) => tokens.push(tokenAt(x, y)));
  return { columns, rows, tokens };
}

/** Draw the kept tokens over a canvas: the others are veiled, and a line goes around the kept. */
export function drawKept(canvas, { columns, rows, tokens }, kept) {
  const context = cleared(canvas);
  const style = getComputedStyle(canvas);
  const cell = cellsOf(canvas, columns, rows);
  const isKept = (x, y) => x >= 0 && y >= 0 && x < columns && y < rows && kept.has(tokens[y * columns + x]);
  context.fillStyle = style.getPropertyValue("--veil");
  each(columns, rows, (x, y) => isKept(x, y) || context.fillRect(...cell(x, y)));
  const line = Math.max(1, Math.min(Math.round(2 * devicePixelRatio), canvas.width / columns / 6));
  context.fillStyle = style.getPropertyValue("--accent");
  each(columns, rows, (x, y) => {
    if (!isKept(x, y)) return;
    const [left, top, width, height] = cell(x, y);
    if (!isKept(x - 1, y)) context.fillRect(left, top, line, height);
    if (!isKept(x + 1, y)) context.fillRect(left + width - line, top, line, height);
    if (!isKept(x, y - 1)) context.fillRect(left, top, width, line);
    if (!isKept(x, y + 1)) context.fillRect(left, top + height - line, width, line);
  });
}

/** Draw the scores over a canvas; the ramp spans all but the extreme hundredths, so that an outlier hides nothing. */
export function drawScores(canvas, { columns, rows, tokens }, scores) {
  const context = cleared(canvas);
  const sorted = Float64Array.from(scores).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const low = at(0.01);
  const span = at(0.99) - low || 1;
  const cell = cellsOf(canvas, columns, rows);
  context.globalAlpha = 0.72;
  each(columns, rows, (x, y) => {
    context.fillStyle = colour((scores[tokens[y * columns + x]] - low) / span);
    context.fillRect(...cell(x, y));
  });
  context.globalAlpha = 1;
}

/** Take everything off a canvas, and fit it to its place on the screen. */
export function cleared(canvas) {
  canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
  canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
  return canvas.getContext("2d");
}

function cellsOf(canvas, columns, rows) {
  const edge = (index, count, size) => Math.round((index * size) / count);
  return (x, y) => {
    const [left, top] = [edge(x, columns, canvas.width), edge(y, rows, canvas.height)];
    return [left, top, edge(x + 1, columns, canvas.width) - left, edge(y + 1, rows, canvas.height) - top];
  };
}

function each(columns, rows, visit) {
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) visit(x, y);
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const step = Math.min(Math.floor(place), RAMP.length - 2);
  const mixed = RAMP[step].map((low, index) => Math.round(low + (RAMP[step + 1][index] - low) * (place - step)));
  return `rgb(${mixed.join(" ")})`;
}
