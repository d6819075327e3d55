// Which visual tokens a keep ratio keeps, by the same rule as the server's: hawk_trt/pruning/hawk.py.

// Those that keep the best scores; the others choose by what the page does not have.
const RANKS_BY_SCORE = ["hawk", "uniform", "fastv-input"];

/** How many of numVisual tokens are kept: min(N, max(minVisualTokens, ceil(N * keepRatio))), in float64. */
export function numKept(numVisual, keepRatio, minVisualTokens) {
  return Math.min(numVisual, Math.max(minVisualTokens, Math.ceil(numVisual * keepRatio)));
}

/** The indices of the count best scores; of equal ones the lower index wins. */
export function best(scores, count) {
  const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
  return new Set(order.slice(0, count));
}

/** Whether the kept tokens of another keep ratio follow from the scores of this answer. */
export function isRankedByScore(details) {
  return RANKS_BY_SCORE.includes(details.selector) && details.keep_mass === null && details.diversity === 0;
}

/**
 * The kept tokens of an answer's images at a keep ratio: for each a Set of token indices.
 * At the ratio that was asked with, what the server kept; at another, null where only the server can tell.
 */
export function keptAt(details, keepRatio) {
  const { images, quota, min_visual_tokens: least } = details;
  if (keepRatio === details.keep_ratio) return images.map(({ kept }) => new Set(kept));
  if (!isRankedByScore(details)) return null;
  if (quota !== "global") return images.map(({ scores }) => best(scores, numKept(scores.length, keepRatio, least)));
  const all = images.flatMap(({ scores }) => scores);
  const kept = best(all, numKept(all.length, keepRatio, least));
  let before = 0; // tokens of the images before
  return images.map(({ scores }) => {
    const first = before;
    before += scores.length;
    return new Set([...scores.keys()].filter((index) => kept.has(first + index)));
  });
}
