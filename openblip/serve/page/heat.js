// Heat maps: fetched once per picture, text and model, drawn over the picture, told in words.

import { call } from "./api.js";
import { announce, byId, element } from "./dom.js";
import { waitingText } from "./panel.js";
import { onPicture, picture } from "./picture.js";

const CANVAS_PX = 240; // the longer side of what is drawn; the browser stretches it over the picture
// Red, green, blue, opacity from no heat to the highest: cold places step back, warm ones glow.
const RAMP = [
  [12, 14, 34, 0.66], [70, 24, 96, 0.58], [176, 42, 92, 0.5], [238, 112, 44, 0.45], [255, 214, 70, 0.42],
];

let explainers = [];
let answers = new Map(); // a promise of an explanation, by model and text
let request = null; // aborts what is under way for a picture that is gone
let shownFor = null; // the button of the word whose map is shown

/** Say which models can explain. */
export function offerHeat(models) {
  explainers = models.filter(({ verbs }) => verbs.includes("explain")).map(({ name }) => name);
}

export const canExplain = () => explainers.length > 0;

/** Forget the explanations of the picture before. */
export function startHeat() {
  onPicture(() => {
    request?.abort();
    request = new AbortController();
    answers = new Map();
    hideHeat();
  });
}

function explanation(text, model) {
  const name = explainers.includes(model) ? model : explainers[0];
  const key = `${name}\n${text}`;
  if (!answers.has(key)) {
    const form = new FormData();
    form.append("model", name);
    form.append("image", picture().blob, "picture");
    form.append("text", text);
    const onWait = (seconds) => tell(seconds ? waitingText(seconds) : "Looking …");
    const asked = call("v1/explain", { form, signal: request?.signal, onWait });
    asked.catch(() => answers.delete(key));
    answers.set(key, asked);
  }
  return answers.get(key);
}

/** Show where the model looks for a word: `index` counts the words of `text`, `button` shows it. */
export async function showHeat({ text, model, index, word, button }) {
  if (!canExplain() || !picture()) return;
  const mine = picture();
  shownFor?.classList.remove("is-shown");
  shownFor = button;
  button.classList.add("is-shown");
  tell(`Looking for “${word}” …`);
  try {
    const { words, match_probability: match } = await explanation(text, model);
    if (shownFor !== button || picture() !== mine) return;
    // The model's own clean-up may join or drop words; then the word is found by its letters.
    const heat = (words.length > index && sameWord(words[index].text, word) ? words[index]
      : words.find((one) => sameWord(one.text, word)))?.heat;
    if (!heat) return hideHeat(`There is no heat map for “${word}”.`);
    paint(heat, mine);
    float(button);
    tell(`“${word}”: bright is where the model looks. The text matches with ${match.toFixed(2)}.`);
    announce(`Heat map of ${word}: strongest ${strongest(heat)}`);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (shownFor === button) hideHeat(error.message, true);
  }
}

const letters = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
const sameWord = (one, other) => letters(one) === letters(other);

/** Take the heat map away, if it is that of `button` or none is named; say why where there is a reason. */
export function hideHeat(reason = "", isError = false, button = null) {
  if (button && shownFor !== button) return;
  shownFor?.classList.remove("is-shown");
  shownFor = null;
  byId("heat").hidden = true;
  float();
  tell(reason, isError);
  if (reason) announce(reason);
}

/** Let the picture float in a corner while the word's map is shown where the picture is not in sight. */
function float(button = null) {
  const place = byId("shown");
  const frame = place.querySelector(".frame");
  const { top, bottom, height } = place.getBoundingClientRect();
  const isAway = bottom < height / 2 || top > innerHeight - height / 2;
  const isFloating = button !== null && isAway;
  // The place keeps its height, so that nothing below it moves.
  if (isFloating && !frame.classList.contains("is-floating")) place.style.minHeight = `${height}px`;
  if (!isFloating) place.style.minHeight = "";
  frame.classList.toggle("is-floating", isFloating);
}

function tell(text, isError = false) {
  const line = byId("heat-line");
  line.hidden = !text;
  line.classList.toggle("is-error", isError);
  line.replaceChildren(text, ...(byId("heat").hidden ? [] : [element("span", { class: "ramp", "aria-hidden": "true" })]));
}

/** Return in words where the strongest place of a heat map is. */
export function strongest(heat) {
  let best = { value: -1, row: 0, column: 0 };
  heat.forEach((line, row) => line.forEach((value, column) => {
    if (value > best.value) best = { value, row, column };
  }));
  const third = (place, size, names) => names[Math.min(2, Math.floor((3 * (place + 0.5)) / size))];
  const high = third(best.row, heat.length, ["upper", "middle", "lower"]);
  const wide = third(best.column, heat[0].length, ["left", "centre", "right"]);
  return high === "middle" && wide === "centre" ? "in the centre" : `at the ${high} ${wide}`;
}

function paint(heat, { width, height }) {
  const canvas = byId("heat");
  const scale = CANVAS_PX / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y += 1) {
    const row = place(y, canvas.height, heat.length);
    for (let x = 0; x < canvas.width; x += 1) {
      const column = place(x, canvas.width, heat[0].length);
      const upper = mix(heat[row.low][column.low], heat[row.low][column.high], column.share);
      const lower = mix(heat[row.high][column.low], heat[row.high][column.high], column.share);
      image.data.set(color(mix(upper, lower, row.share)), 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.hidden = false;
}

const mix = (one, other, share) => one + (other - one) * share;

/** Return the two neighbours among `size` places that pixel `at` of `length` lies between. */
function place(at, length, size) {
  const exact = Math.min(size - 1, Math.max(0, ((at + 0.5) / length) * size - 0.5));
  const low = Math.floor(exact);
  return { low, high: Math.min(size - 1, low + 1), share: exact - low };
}

function color(value) {
  const exact = Math.min(1, Math.max(0, value)) * (RAMP.length - 1);
  const low = Math.min(RAMP.length - 2, Math.floor(exact));
  const [red, green, blue, opacity] = RAMP[low].map((one, i) => mix(one, RAMP[low + 1][i], exact - low));
  return [red, green, blue, 255 * opacity];
}
