// A text as a row of words: shaded by confidence, each with its heat map on hover, focus or tap.

import { byId, element } from "./dom.js";
import { canExplain, hideHeat, showHeat } from "./heat.js";

const HOVER_MS = 130; // a mouse that only passes asks the server for nothing

let pinned = null; // the word whose map stays until it is tapped again

export class WordLine {
  #text = null;

  /** label: what the text is, for screen readers; model: a function that returns a model's name. */
  constructor(label, model) {
    this.model = model;
    this.label = label;
    this.words = [];
    this.node = element("div", {
      class: "words", role: "toolbar", "aria-label": label, onkeydown: (event) => this.#move(event),
    });
  }

  /** Add a word; `probability` in [0, 1] shades it, null leaves it plain. */
  add(text, probability = null) {
    const number = this.words.length;
    const told = probability === null ? text : `${text}, probability ${probability.toFixed(3)}`;
    const button = element("button", {
      type: "button", class: "word", "aria-label": told, tabindex: number === 0 ? 0 : -1,
    }, text);
    if (probability !== null) {
      button.style.setProperty("--unsure-share", `${Math.round(85 * (1 - probability))}%`);
      button.classList.toggle("is-unsure", probability < 0.5);
      button.dataset.probability = probability.toFixed(3);
    }
    this.#listen(button, text, probability, number);
    this.words.push({ text, probability });
    this.node.append(button, " ");
  }

  /** Say that the text is whole: from now on its words have heat maps. */
  finish(text) {
    this.#text = text;
    if (!canExplain()) return;
    this.node.setAttribute("aria-label", `${this.label}; arrow keys go through the words`);
    for (const button of this.node.children) button.setAttribute("aria-pressed", "false");
  }

  #listen(button, word, probability, index) {
    let timer;
    const show = () => {
      if (this.#text !== null) {
        showHeat({ text: this.#text, model: this.model(), index, word, button });
      }
    };
    const start = () => {
      tip(button, probability);
      if (pinned === null || pinned === button) show();
    };
    const end = () => {
      clearTimeout(timer);
      tip(null);
      if (pinned === null) hideHeat("", false, button);
    };
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "mouse") return;
      tip(button, probability);
      timer = setTimeout(start, HOVER_MS);
    });
    button.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && document.activeElement !== button) end();
      clearTimeout(timer);
    });
    button.addEventListener("focus", () => {
      for (const one of this.node.children) one.tabIndex = one === button ? 0 : -1;
      unpin(button);
      start();
    });
    button.addEventListener("blur", end);
    button.addEventListener("click", () => {
      if (this.#text === null || !canExplain()) return;
      if (pinned === button) {
        unpin();
        hideHeat();
      } else {
        unpin();
        pinned = button;
        button.setAttribute("aria-pressed", "true");
        show();
      }
    });
  }

  #move(event) {
    const buttons = [...this.node.children];
    const at = buttons.indexOf(document.activeElement);
    const isRight = getComputedStyle(this.node).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const isLeft = isRight === "ArrowRight" ? "ArrowLeft" : "ArrowRight";
    let to = null;
    if (event.key === isRight || event.key === "ArrowDown") to = Math.min(buttons.length - 1, at + 1);
    else if (event.key === isLeft || event.key === "ArrowUp") to = Math.max(0, at - 1);
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = buttons.length - 1;
    else if (event.key === "Escape") letGo();
    if (to === null) return;
    event.preventDefault();
    buttons[to].focus();
  }
}

/** Let go of any word: its text is about to be replaced. */
export function letGo() {
  unpin();
  hideHeat();
  tip(null);
}

/** Let go of the word whose map stays, unless it is `kept`. */
function unpin(kept = null) {
  if (pinned === kept) return;
  pinned?.setAttribute("aria-pressed", "false");
  pinned = null;
}

/** Show the exact probability above a word; null takes it away. */
function tip(button, probability) {
  const box = byId("tip");
  box.hidden = button === null || probability === null;
  if (box.hidden) return;
  box.textContent = `probability ${probability.toFixed(3)}`;
  const word = button.getBoundingClientRect();
  const wide = box.offsetWidth;
  const left = word.left + word.width / 2 - wide / 2;
  box.style.left = `${Math.max(8, Math.min(document.documentElement.clientWidth - wide - 8, left))}px`;
  const above = word.top - box.offsetHeight - 6;
  box.style.top = `${above > 4 ? above : word.bottom + 6}px`;
}

/** Return the legend of the shading. */
export function legend() {
  const samples = [1, 0.75, 0.5, 0.25, 0].map((probability) => {
    const sample = element("span", { class: "sample" });
    sample.style.setProperty("--unsure-share", `${Math.round(85 * (1 - probability))}%`);
    return sample;
  });
  return element("p", { class: "note legend" },
    "sure ", element("span", { class: "samples", "aria-hidden": "true" }, ...samples), " unsure",
    canExplain() ? " · point at a word to see where the model looks" : "");
}
