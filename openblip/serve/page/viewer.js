// One found picture, larger: what is known of it, its neighbours, and a search with it.

import { fetchBlob, pictureAddress } from "./api.js";
import { byId, element, twoDigits } from "./dom.js";
import { describe } from "./gallery.js";
import { show } from "./panel.js";
import { markPixelated, usePicture } from "./picture.js";

let hits = [];
let place = 0;
let opener = null;

/** Say which hits can be looked at. */
export function offerHits(found) {
  hits = found;
}

export function openViewer(number) {
  opener = document.activeElement;
  look(number);
  byId("viewer").showModal();
}

function look(number) {
  place = number;
  const hit = hits[place];
  byId("viewer-title").textContent = describe(hit);
  byId("viewer-before").disabled = place === 0;
  byId("viewer-next").disabled = place === hits.length - 1;
  show(byId("viewer-status"), "");
  const image = byId("viewer-image");
  image.removeAttribute("src");
  image.alt = describe(hit);
  image.width = hit.width;
  image.height = hit.height;
  image.style.setProperty("--shape", String(hit.width / hit.height));
  markPixelated(image, hit.width, hit.height);
  pictureAddress(`${hit.picture}/original`).then(
    (address) => {
      if (hits[place] === hit) image.src = address;
    },
    (error) => show(byId("viewer-status"), error.message, { isError: true }),
  );
  byId("viewer-facts").replaceChildren(...facts(hit));
}

function facts(hit) {
  const known = { place: `${place + 1} of ${hits.length}`, key: hit.key };
  if (hit.match_probability !== null && hit.match_probability !== undefined) {
    known["match probability"] = twoDigits(hit.match_probability);
  }
  known["cosine"] = twoDigits(hit.similarity);
  known["size"] = `${hit.width} × ${hit.height} px`;
  for (const [name, value] of Object.entries(hit.metadata ?? {})) {
    if (name in known || value === null || value === "") continue;
    known[name] = typeof value === "object" ? JSON.stringify(value) : String(value);
  }
  return Object.entries(known).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

/** Listen to the viewer's buttons and keys; `searchWith()` is called once its picture is in use. */
export function startViewer(searchWith) {
  const viewer = byId("viewer");
  byId("viewer-close").addEventListener("click", () => viewer.close());
  byId("viewer-before").addEventListener("click", () => step(-1));
  byId("viewer-next").addEventListener("click", () => step(1));
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close(); // beside the picture
  });
  viewer.addEventListener("close", () => opener?.focus());
  byId("viewer-search").addEventListener("click", async () => {
    const hit = hits[place];
    const status = byId("viewer-status");
    show(status, "Fetching the picture …");
    try {
      const isUsed = await usePicture(await fetchBlob(`${hit.picture}/original`), hit.key);
      viewer.close();
      if (isUsed) searchWith();
    } catch (error) {
      show(status, error.message, { isError: true });
    }
  });
}

function step(by) {
  const next = place + by;
  if (next < 0 || next >= hits.length) return;
  look(next);
  const button = byId(by < 0 ? "viewer-before" : "viewer-next");
  if (button.disabled) byId("viewer-close").focus();
}
