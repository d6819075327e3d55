// The page: images and a question go to the server; its answer, the kept tokens and the times come back.

import { ServerError, ask, servedModel, useKey } from "./chat.js";
import { isRankedByScore, keptAt } from "./kept.js";
import { cleared, drawKept, drawScores, panelsOf } from "./overlay.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const STAGES = [
  ["preprocess", "Image and prompt"],
  ["vision", "Vision"],
  ["select", "Choice of tokens"],
  ["first_layer", "First layer"],
  ["decoder", "Decoder"],
  ["decode", "Decode steps"],
];

const element = (id) => document.getElementById(id);
const made = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const decimal = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en-GB");

let model = null; // as /v1/models tells of it
let images = []; // the data: URL of each, and the URL by which the page shows it
let current = 0; // the image that is shown
let details = null; // of the last answer about these images
let turns = []; // the messages of the last question, with its answer
let running = null; // the AbortController of the question under way
let afterKey = start; // what to do once there is a key
let keyGiven = false;

async function start() {
  try {
    model = await servedModel();
  } catch (error) {
    element("model").textContent = "";
    showError(error, start);
    return;
  }
  element("model").textContent = `${model.id} · ${model.hawk.family}, ${model.hawk.dtype}`;
  element("selector").replaceChildren(...model.hawk.selectors.map((name) => new Option(name, name)));
  element("selector").value = model.hawk.selector;
  element("ratio").value = Math.round(model.hawk.keep_ratio * 100);
  showRatio();
}

// The images

async function takeImages(files, added = false) {
  showMessage();
  const wrong = files.find((file) => !KINDS.includes(file.type));
  if (wrong) {
    const got = `${wrong.name || "The file"}: got ${wrong.type || "an unknown kind"}`;
    showMessage(`${got}, expected PNG, JPEG, WebP, GIF or BMP.`);
    return;
  }
  let taken;
  try {
    taken = await Promise.all(files.map(async (file) => ({ url: await dataUrl(file), shown: URL.createObjectURL(file) })));
  } catch {
    showMessage("A file cannot be read.");
    return;
  }
  const kept = added ? images : [];
  for (const image of images) if (!kept.includes(image)) URL.revokeObjectURL(image.shown);
  askAbout([...kept, ...taken], kept.length);
}

function dataUrl(file) {
  return new Promise((done, fail) => {
    const reader = Object.assign(new FileReader(), { onerror: fail, onload: () => done(reader.result) });
    reader.readAsDataURL(file);
  });
}

/** Begin anew with these images. */
function askAbout(chosen, shown) {
  running?.abort();
  [images, details, turns] = [chosen, null, []];
  element("follow").checked = false;
  element("follow-up").hidden = true;
  element("empty").hidden = images.length > 0;
  element("frame").hidden = element("add-label").hidden = !images.length;
  element("drop").classList.toggle("full", images.length > 0);
  element("strip").hidden = element("remove").hidden = images.length < 2;
  element("strip").replaceChildren(...images.map(({ shown }, index) => thumb(shown, index)));
  element("result").hidden = element("earlier").hidden = true;
  element("asked").replaceChildren();
  choose(Math.min(shown, images.length - 1));
  element("question").focus({ preventScroll: true });
}

function thumb(shown, index) {
  const button = made("button", { type: "button", className: "plain thumb", onclick: () => choose(index) });
  button.append(made("img", { src: shown, alt: "Image" }), ` ${index + 1}`); // the number is read with the image
  return button;
}

function choose(index) {
  current = index;
  for (const [place, button] of [...element("strip").children].entries()) button.ariaPressed = place === index;
  if (images.length) element("picture").src = element("thumbnail-picture").src = images[index].shown;
  show();
}

element("remove").addEventListener("click", () => {
  URL.revokeObjectURL(images[current].shown);
  askAbout(images.filter((_, index) => index !== current), current);
});

element("sample").addEventListener("click", async () => {
  const sample = await (await fetch("page/sample.webp")).blob();
  await takeImages([new File([sample], "sample.webp", { type: "image/webp" })]);
  element("question").value = "What colour is the heart?";
});

/** An image as a data URL of at most so many characters: as it is, or smaller. */
async function fitting({ url, shown }, most) {
  const [picture, canvas] = [new Image(), document.createElement("canvas")];
  for (let scale = 1; url.length > most; scale *= 0.7) {
    picture.src ||= shown;
    await picture.decode();
    canvas.width = Math.ceil(picture.naturalWidth * scale);
    canvas.height = Math.ceil(picture.naturalHeight * scale);
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    url = canvas.toDataURL("image/jpeg", 0.9);
  }
  return url;
}

/** The images among what was dropped or pasted; where there is none, the first file, which is told of. */
function imagesOf(transfer) {
  const files = Array.from(transfer?.files ?? []);
  const found = files.filter((file) => file.type.startsWith("image/"));
  return found.length ? found : files.slice(0, 1);
}

for (const id of ["choose", "add", "camera"]) {
  element(id).addEventListener("change", ({ target }) => {
    if (target.files.length) takeImages([...target.files], id === "add");
    target.value = ""; // so that the same file can be chosen again
  });
}
element("picture").addEventListener("load", ({ target }) => {
  element("frame").style.setProperty("--aspect", target.naturalWidth / target.naturalHeight);
});
element("picture").addEventListener("error", () => {
  askAbout(images.filter((_, index) => index !== current), 0);
  showMessage("This file cannot be shown as an image. It may be damaged.");
});
addEventListener("paste", (event) => {
  const files = imagesOf(event.clipboardData);
  if (files.length) {
    event.preventDefault();
    takeImages(files);
  }
});
// the whole window takes a drop, since a browser would otherwise leave the page for the image
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", kind === "dragover");
    const files = kind === "drop" ? imagesOf(event.dataTransfer) : [];
    if (files.length) takeImages(files);
  });
}

// The question

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  question();
});
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("form").requestSubmit();
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("compare").addEventListener("click", () => {
  element("ratio").value = 100;
  show();
  element("form").requestSubmit();
});

async function question() {
  showMessage();
  if (!model) await start();
  if (!model || running) return;
  const text = element("question").value.trim();
  const earlier = element("follow").checked ? turns : [];
  if (!earlier.length && images.length > model.hawk.max_images) {
    showMessage(`This server takes ${model.hawk.max_images} images at a time, and here are ${images.length}.`);
    return;
  }
  const mine = (running = new AbortController());
  const answer = element("answer");
  element("result").hidden = element("stop").hidden = false;
  element("times").hidden = element("ask").disabled = true;
  element("usage").textContent = answer.textContent = "";
  answer.classList.add("growing");
  answer.scrollIntoView({ block: "nearest" }); // on a phone it is below the image
  try {
    const most = (0.95 * model.hawk.max_body_bytes) / images.length;
    const sent = earlier.length ? [] : await Promise.all(images.map((image) => fitting(image, most)));
    const content = [...sent.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
    const body = {
      model: model.id,
      messages: [...earlier, { role: "user", content }],
      temperature: 0,
      pruning: {
        keep_ratio: ratio(),
        selector: element("selector").value,
        // a follow-up has no image of its own to choose by
        ...(earlier.length && !model.hawk.query && { query: "turn" }),
      },
    };
    const told = await ask(body, mine.signal, (piece) => answer.append(piece));
    if (mine.signal.aborted) return;
    details = told.details.images.length ? told.details : null;
    showUsage(told.usage);
    showTimes(told.details.seconds);
    turns = [...body.messages, { role: "assistant", content: answer.textContent }];
    element("follow-up").hidden = false;
    if (images.length) remember(told, text, answer.textContent);
    show();
    answer.scrollIntoView({ block: "nearest" }); // what show() has added above may have moved it
  } catch (error) {
    if (error.name === "AbortError") element("usage").textContent = "Stopped.";
    else showError(error, question);
  } finally {
    answer.classList.remove("growing");
    running = null;
    element("stop").hidden = true;
    element("ask").disabled = false;
  }
}

// What came back

function showUsage({ prompt_tokens, completion_tokens }) {
  const [asked, answered] = [prompt_tokens, completion_tokens].map((count) => whole.format(count));
  element("usage").textContent = `${asked} tokens asked before pruning, ${answered} answered`;
}

function showTimes(seconds) {
  const known = STAGES.reduce((sum, [name]) => sum + seconds[name], 0);
  const shown = STAGES.filter(([name]) => name !== "select" || seconds.select > 0);
  const rows = shown.map(([name, label]) => [label, seconds[name]]);
  rows.push(["Waiting and the rest", Math.max(seconds.total - known, 0)], ["Total", seconds.total]);
  element("stages").replaceChildren(...rows.map(([label, time]) => stageRow(label, time, time / seconds.total)));
  element("times").hidden = false;
}

function stageRow(label, seconds, share) {
  const [row, bar] = [made("tr"), made("div", { className: "bar" })];
  bar.style.width = `${Math.min(share, 1) * 100}%`;
  row.append(made("th", { scope: "row", textContent: label }));
  row.insertCell().append(bar);
  row.insertCell().textContent = duration(seconds);
  return row;
}

function duration(seconds) {
  return seconds < 1 ? `${decimal.format(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
}

function remember(told, question, answer) {
  const row = element("asked").insertRow(0);
  const { seconds, selector } = told.details;
  const kept = `${whole.format(told.usage.kept_visual_tokens)} of ${whole.format(told.usage.visual_tokens)}`;
  const cells = [question, kept, selector, duration(seconds.total), answer];
  for (const text of cells) row.insertCell().textContent = text;
  element("earlier").hidden = false;
}

// The kept tokens

function ratio() {
  return element("ratio").valueAsNumber / 100;
}

function showRatio() {
  const text = `${element("ratio").value} %`;
  element("percent").textContent = text;
  element("ratio").setAttribute("aria-valuetext", text);
  const asked = details && ratio() === details.keep_ratio && element("selector").value === details.selector;
  element("ask").textContent = details && !asked ? `Ask again, ${text} kept` : "Ask";
}

function show() {
  showRatio();
  const panels = details ? panelsOf(details.images[current]) : [];
  const kept = details && (keptAt(details, ratio()) ?? keptAt(details, details.keep_ratio));
  const view = document.querySelector("input[name=view]:checked").value;
  element("thumbnail").hidden = panels.length < 2;
  element("views").hidden = !details;
  element("legend").hidden = view !== "scores";
  element("compare").hidden = !details || details.keep_ratio === 1;
  for (const [index, id] of ["overlay", "thumbnail-overlay"].entries()) {
    if (!panels[index] || view === "image") cleared(element(id));
    else if (view === "kept") drawKept(element(id), panels[index], kept[current]);
    else drawScores(element(id), panels[index], details.images[current].scores);
  }
  element("count").textContent = countText(kept);
  element("overlay").setAttribute("aria-label", details ? element("count").textContent : "No tokens yet");
}

function countText(kept) {
  if (!details) return "Ask first; then move the slider to see which tokens stay.";
  const sum = (counts) => counts.reduce((left, right) => left + right, 0);
  const all = details.images.map(({ scores }) => scores.length);
  const here = kept[current].size;
  const among = kept.length > 1 ? `; of this image ${whole.format(here)} of ${whole.format(all[current])}` : "";
  const text = keptOf(sum(kept.map(({ size }) => size)), sum(all)) + among;
  if (ratio() === details.keep_ratio || isRankedByScore(details)) return text;
  const asked = `${decimal.format(details.keep_ratio * 100)} %`;
  return `${text} at ${asked}. What ${details.selector} keeps at another ratio only the server can tell: ask again.`;
}

function keptOf(kept, all) {
  return `${whole.format(kept)} of ${whole.format(all)} visual tokens kept (${decimal.format((100 * kept) / all)} %)`;
}

element("ratio").addEventListener("input", show);
element("selector").addEventListener("change", showRatio);
for (const view of document.querySelectorAll("input[name=view]")) view.addEventListener("change", show);
new ResizeObserver(show).observe(element("overlay"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

// What went wrong

function showError(error, again) {
  if (error instanceof ServerError && error.status === 401) {
    element("key-form").hidden = false;
    element("key").focus();
    afterKey = again;
    if (keyGiven) showMessage("The server does not know this key.");
    return; // else the field says what is missing
  }
  const message = error.message.replace(/^messages\S*image_url: /, "The image: ").replace(/^messages: /, "The question: ");
  showMessage(error instanceof ServerError ? message : `The page failed: ${message}`);
}

/** Show what went wrong, or nothing any more. */
function showMessage(text = "") {
  element("alert").textContent = text;
  element("alert").hidden = !text;
}

element("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  showMessage();
  useKey(element("key").value);
  keyGiven = true;
  element("key").value = "";
  element("key-form").hidden = true;
  await afterKey();
});

start();
