// Small helpers over the document.

export const byId = (id) => document.getElementById(id);

/** Make an element; attributes that are `false`, `null` or `undefined` are left out, text is text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Say something to who listens with a screen reader; the same words are said again if repeated. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/** Write a probability or a cosine with two digits, without rounding what is not certain to 1. */
export function twoDigits(value) {
  if (value < 1 && value >= 0.995) return "> 0.99";
  if (value > 0 && value < 0.005) return "< 0.01";
  return value.toFixed(2).replace(/^-(0\.00)$/, "$1");
}

/** Cut text at the given separator; empty parts are left out. */
export function parts(text, separator) {
  return text.split(separator).map((part) => part.trim()).filter(Boolean);
}

/** Return a named bar with its number: `share` in [0, 1] is its length. */
export function measure(name, share, number, color = 0) {
  const bar = element("span", { class: `bar color-${color}` });
  bar.style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(1)}%`;
  return element("div", { class: "measure" },
    element("span", { class: "measure-name" }, name),
    element("span", { class: "track", "aria-hidden": "true" }, bar),
    element("span", { class: "number" }, ` ${number}`));
}
