// A panel: one thing that the server does, with its model, its form, and how the work stands.

import { Unreachable } from "./api.js";
import { byId, element } from "./dom.js";

/** Show a sentence in a status line; an error gets a button that tries again. */
export function show(status, text, { isError = false, again = null } = {}) {
  status.classList.toggle("is-error", isError);
  status.replaceChildren(text);
  if (again) status.append(element("button", { type: "button", onclick: again }, "Try again"));
}

/** Return what a line says while a busy server lets us wait. */
export const waitingText = (seconds) =>
  seconds ? `The server is busy. Trying again in ${seconds} s.` : "Trying again …";

export class Panel {
  #work = null;
  #task = null;

  /** id: of the section; verb: what a model must be able to do for it. */
  constructor(id, verb) {
    this.section = byId(id);
    this.verb = verb;
    this.form = this.section.querySelector("form");
    this.status = this.section.querySelector(".status");
    this.result = this.section.querySelector(".result");
    this.missing = this.section.querySelector(".missing");
    this.models = [];
  }

  /** Offer the models that can do this; without one, show `missing` (nodes and text) instead. */
  offer(models, missing) {
    this.models = models.filter((model) => model.verbs.includes(this.verb)).map(({ name }) => name);
    const chosen = this.model;
    const place = this.section.querySelector(".model");
    place.replaceChildren();
    if (this.models.length > 1) {
      const select = element("select", { "aria-label": `Model for: ${this.verb}` },
        ...this.models.map((name) => element("option", { value: name }, name)));
      if (this.models.includes(chosen)) select.value = chosen;
      place.append(select);
    } else {
      place.append(this.models[0] ?? "");
    }
    this.setMissing(this.models.length ? null : missing);
  }

  setMissing(missing) {
    this.missing.hidden = !missing;
    this.missing.replaceChildren(...(missing ?? []));
    this.form.hidden = Boolean(missing);
    this.result.hidden = Boolean(missing);
  }

  get isOffered() {
    return this.models.length > 0 && !this.form.hidden;
  }

  /** The chosen model's name; undefined leaves the choice to the server. */
  get model() {
    return this.section.querySelector(".model select")?.value ?? this.models[0];
  }

  /** Return a form for the server with the model's name and the given fields; lists repeat theirs. */
  fields(fields) {
    const form = new FormData();
    if (this.model) form.append("model", this.model);
    for (const [name, value] of Object.entries(fields)) {
      for (const one of Array.isArray(value) ? value : [value]) {
        if (one === null || one === undefined || one === "") continue;
        form.append(name, typeof one === "boolean" || typeof one === "number" ? String(one) : one);
      }
    }
    return form;
  }

  /**
   * Do some work, and say how it stands: `task({signal, onWait})` returns what the line says at the end.
   * Work that is under way is given up first.
   */
  async run(task, working = "Working …") {
    this.stop();
    const controller = new AbortController();
    this.#work = controller;
    this.#task = () => this.run(task, working);
    this.section.setAttribute("aria-busy", "true");
    show(this.status, working);
    try {
      const said = await task({
        signal: controller.signal,
        onWait: (seconds) => show(this.status, seconds ? waitingText(seconds) : working),
      });
      if (this.#work === controller) show(this.status, said ?? "");
    } catch (error) {
      if (this.#work === controller) this.#fail(error);
    } finally {
      if (this.#work === controller) {
        this.#work = null;
        this.section.removeAttribute("aria-busy");
      }
    }
  }

  /** Give up what is under way and clear the line. */
  stop() {
    this.#work?.abort(new DOMException("Given up", "AbortError"));
    this.#work = null;
    this.section.removeAttribute("aria-busy");
    show(this.status, "");
  }

  #fail(error) {
    if (error.name === "AbortError") return show(this.status, "");
    // 4xx says that the request is wrong: the same again would be wrong again.
    const isLasting = error.status >= 400 && error.status < 500 && ![401, 429].includes(error.status);
    show(this.status, error.message, { isError: true, again: isLasting ? null : this.#task });
    if (error.status === undefined && !(error instanceof Unreachable)) throw error;
    return undefined;
  }
}
