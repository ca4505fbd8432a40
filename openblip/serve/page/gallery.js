// A justified gallery: rows of equal height that fill the width; pictures keep their shape, whole.

import { pictureAddress } from "./api.js";
import { element, twoDigits } from "./dom.js";
import { markPixelated } from "./picture.js";

const GAP_PX = 8;
const MAX_STRETCH = 1.35; // how much higher than wished a row may get to fill the width

/**
 * Return the size of each picture in rows that fill `width`; the last row is not stretched.
 *
 * shapes: width / height of each picture; wished: the height of a row.
 */
export function justify(shapes, width, wished) {
  const sizes = [];
  let row = [];
  let usual = wished;
  const close = (isLast) => {
    const sum = row.reduce((total, shape) => total + shape, 0);
    const filling = (width - GAP_PX * (row.length - 1)) / sum;
    // What cannot fill a row without being blown up is as high as the row before, or as wished.
    const isFilled = filling <= wished * MAX_STRETCH && (!isLast || filling <= usual);
    const height = isFilled ? filling : Math.min(usual, filling);
    usual = height;
    // Rounded down, so that a row never wraps for a fraction of a pixel.
    for (const shape of row) {
      sizes.push({ width: Math.floor(shape * height * 10) / 10, height: Math.floor(height * 10) / 10 });
    }
    row = [];
  };
  for (const shape of shapes) {
    row.push(shape);
    const sum = row.reduce((total, one) => total + one, 0);
    if (sum * wished + GAP_PX * (row.length - 1) >= width) close(false);
  }
  if (row.length) close(true);
  return sizes;
}

/** Return the text that describes a hit best: its caption, or else its key. */
export function describe({ key, metadata }) {
  for (const name of ["caption", "text", "title"]) {
    if (typeof metadata?.[name] === "string" && metadata[name]) return metadata[name];
  }
  const captions = metadata?.captions;
  if (Array.isArray(captions) && captions.length) {
    return typeof captions[0] === "string" ? captions[0] : captions[0].text ?? key;
  }
  return key;
}

/** Return what orders the hits: match and cosine together, or the cosine alone. */
export const scoreText = (hit) =>
  hit.match_probability === null || hit.match_probability === undefined
    ? `cosine ${twoDigits(hit.similarity)}`
    : `match ${twoDigits(hit.match_probability)} · cosine ${twoDigits(hit.similarity)}`;

export class Gallery {
  #hits = [];

  /** list: a <ul>; onOpen(number of the hit in the list): called for a picture that is opened. */
  constructor(list, onOpen) {
    this.list = list;
    this.onOpen = onOpen;
    new ResizeObserver(() => this.layOut()).observe(list);
  }

  show(hits) {
    for (const image of this.list.querySelectorAll("img[src^='blob:']")) URL.revokeObjectURL(image.src);
    this.#hits = hits;
    this.list.replaceChildren(...hits.map((hit, place) => this.#item(hit, place)));
    this.layOut();
  }

  #item(hit, place) {
    const image = element("img", { alt: "", loading: "lazy", decoding: "async" });
    markPixelated(image, hit.width, hit.height);
    pictureAddress(`${hit.picture}?side=480`).then(
      (address) => { image.src = address; },
      () => { image.alt = "This picture could not be loaded."; },
    );
    const score = scoreText(hit);
    return element("li", {},
      element("button", {
        type: "button", class: "hit", onclick: () => this.onOpen(place),
        "aria-label": `${place + 1}: ${describe(hit)}, ${score}`,
      }, image, element("span", { class: "score" }, score)));
  }

  layOut() {
    const width = this.list.clientWidth;
    if (!width || !this.#hits.length) return;
    const wished = width < 500 ? 120 : 176;
    // Panoramas and towers are shown whole, but not as slivers.
    const shapes = this.#hits.map((hit) => Math.min(4, Math.max(0.4, hit.width / hit.height)));
    justify(shapes, width, wished).forEach((size, place) => {
      const image = this.list.children[place].querySelector("img");
      image.style.width = `${size.width}px`;
      image.style.height = `${size.height}px`;
    });
  }
}
