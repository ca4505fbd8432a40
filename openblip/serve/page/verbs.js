// What is done with the picture: caption, ask, match, classify.

import { call, stream } from "./api.js";
import { announce, byId, element, measure, parts, twoDigits } from "./dom.js";
import { Panel } from "./panel.js";
import { askForPicture, onPicture, picture } from "./picture.js";
import { WordLine, legend, letGo } from "./words.js";

const FLAGS = { repetition: "repetition", low_confidence: "low confidence" };

/** Return a panel whose form does `work(options)` on the picture; another picture clears its result. */
function pictureVerb(id, empty, work, working) {
  const panel = new Panel(id, id);
  const clear = () => panel.result.replaceChildren(...empty());
  panel.form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!picture()) askForPicture(panel.status);
    else panel.run((options) => work(panel, options), working);
  });
  onPicture(() => {
    panel.stop();
    letGo();
    clear();
  });
  return panel;
}

/** Start the caption's panel: it writes as soon as there is a picture. */
export function startCaption() {
  const empty = () => [
    element("p", { class: "note" }, "A picture's caption appears here, word by word."),
  ];
  const panel = pictureVerb("caption", empty, writeCaption, "Writing …");
  onPicture((shown) => {
    panel.form.querySelector("[type=submit]").textContent = "Write again";
    if (shown && panel.isOffered) panel.form.requestSubmit();
  });
  return panel;
}

async function writeCaption(panel, { signal, onWait }) {
  const method = byId("caption-method").value;
  const model = panel.model;
  const line = new WordLine("Caption", () => model);
  const isStreamed = method !== "beam";
  letGo();
  panel.result.replaceChildren(line.node);
  line.node.classList.toggle("is-writing", isStreamed);
  const form = panel.fields({
    image: picture().blob, method, prompt: byId("caption-prompt").value, stream: isStreamed,
    seed: method === "nucleus" ? Math.floor(Math.random() * 2 ** 31) : null,
  });
  let answer = null;
  if (isStreamed) {
    await stream("v1/caption", {
      form, signal, onWait,
      onEvent: (name, content) => {
        if (name === "word") line.add(content.text, content.probability);
        else if (name === "done") answer = content;
      },
    });
    if (!answer) throw new Error("The caption broke off.");
  } else {
    answer = await call("v1/caption", { form, signal, onWait });
  }
  line.node.classList.remove("is-writing");
  showCaption(panel, line, answer.captions[0]);
}

function showCaption(panel, line, caption) {
  // Without streaming nothing stands there yet.
  for (const word of caption.words.slice(line.words.length)) line.add(word.text, word.probability);
  line.finish(caption.text);
  const flags = caption.flags.map((flag) => FLAGS[flag] ?? flag);
  if (!caption.is_finished) flags.push("not finished");
  if (!caption.words.length) panel.result.append(element("p", { class: "note" }, "The caption is empty."));
  if (flags.length) {
    panel.result.append(element("p", { class: "badges" },
      ...flags.map((flag) => element("span", { class: "badge bad" }, flag))));
  }
  panel.result.append(legend());
  announce(`Caption: ${caption.text}${flags.length ? `; flagged: ${flags.join(", ")}` : ""}`);
}

/** Start the panel that answers questions; earlier answers about the picture stay below. */
export function startAsk() {
  return pictureVerb("ask", () => [], async (panel, options) => {
    const question = byId("ask-question").value.trim();
    const form = panel.fields({
      image: picture().blob, question, answers: parts(byId("ask-answers").value, ","),
    });
    const { answers } = await call("v1/ask", { form, ...options });
    const rows = answers.map((one) =>
      element("li", {}, measure(one.text, one.probability, twoDigits(one.probability))));
    panel.result.prepend(element("li", {},
      element("p", { class: "question" }, question), element("ol", { class: "bars" }, ...rows)));
    const [best] = answers;
    announce(best ? `Answer: ${best.text}, probability ${twoDigits(best.probability)}` : "No answer");
    byId("ask-question").select();
    return answers.length ? "" : "The model gave no answer.";
  }, "Thinking …");
}

/** Start the panel that compares texts with the picture. */
export function startMatch() {
  return pictureVerb("match", () => [], async (panel, options) => {
    const texts = parts(byId("match-texts").value, "\n");
    if (!texts.length) return "Write a text first.";
    const model = panel.model;
    const form = panel.fields({ image: picture().blob, texts });
    const answer = await call("v1/match", { form, ...options });
    const best = Math.max(...answer.texts.map((one) => one.match_probability));
    letGo();
    panel.result.replaceChildren(...answer.texts.map((one) => {
      const line = new WordLine("Text", () => model);
      for (const word of parts(one.text, /\s+/u)) line.add(word);
      line.finish(one.text);
      const isBest = answer.texts.length > 1 && one.match_probability === best;
      return element("li", {}, line.node,
        measure("match", one.match_probability, twoDigits(one.match_probability)),
        measure("cosine", one.similarity, twoDigits(one.similarity), 1),
        ...(isBest ? [element("span", { class: "badge neutral" }, "best match")] : []));
    }));
    announce(answer.texts.map((one) => `${one.text}: match ${twoDigits(one.match_probability)}`).join("; "));
    return "";
  }, "Comparing …");
}

/** Start the panel that finds the best of some labels. */
export function startClassify() {
  return pictureVerb("classify", () => [], async (panel, options) => {
    const labels = [...new Set(parts(byId("classify-labels").value, /[,\n]/u))];
    if (labels.length < 2) return "Write at least two labels.";
    const form = panel.fields({
      image: picture().blob, labels, score: byId("classify-score").value,
    });
    const answer = await call("v1/classify", { form, ...options });
    panel.result.replaceChildren(...answer.labels.map((one) => {
      const details = [];
      if (one.similarity !== null) details.push(`cosine ${twoDigits(one.similarity)}`);
      if (one.match_probability !== null) details.push(`match ${twoDigits(one.match_probability)}`);
      return element("li", {}, measure(one.label, one.probability, twoDigits(one.probability)),
        element("p", { class: "note" }, details.join(" · ")));
    }));
    const [best] = answer.labels;
    announce(`${best.label}: probability ${twoDigits(best.probability)}`);
    return "";
  }, "Classifying …");
}
