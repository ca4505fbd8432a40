// Searches the index by text, by the picture, or by both.

import { call } from "./api.js";
import { announce, byId, element, parts } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Panel } from "./panel.js";
import { onPicture, picture } from "./picture.js";
import { offerHits, openViewer, startViewer } from "./viewer.js";

const FIRST_LIMIT = 24;
const MORE = 2; // how many times as many "Show more" asks for

export function startSearch() {
  const panel = new Panel("search", "search");
  const gallery = new Gallery(panel.result, openViewer);
  const isWithPicture = byId("search-picture");
  const search = (limit = FIRST_LIMIT) => {
    const text = byId("search-text").value.trim();
    const image = isWithPicture.checked ? picture()?.blob : null;
    panel.run((options) => find(panel, gallery, { text, image, limit }, options), "Searching …");
  };
  panel.form.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("search-more").addEventListener("click", (event) => search(Number(event.target.dataset.limit)));
  onPicture((shown) => {
    isWithPicture.disabled = !shown;
    if (!shown) isWithPicture.checked = false;
    const thumbnail = byId("search-thumbnail");
    thumbnail.hidden = !shown;
    if (shown) thumbnail.src = shown.address;
    else thumbnail.removeAttribute("src");
  });
  startViewer(() => {
    byId("search-text").value = "";
    isWithPicture.checked = true;
    search();
    panel.section.scrollIntoView({ block: "start" });
    panel.form.querySelector("[type=submit]").focus({ preventScroll: true });
  });
  return panel;
}

async function find(panel, gallery, { text, image, limit }, options) {
  if (!text && !image) return "Write what to look for, or search with a picture.";
  const form = panel.fields({
    text, image, limit, rerank: byId("search-rerank").checked,
    where: parts(byId("search-where").value, ";"),
  });
  const answer = await call("v1/search", { form, ...options });
  offerHits(answer.hits);
  gallery.show(answer.hits);
  const more = byId("search-more");
  more.hidden = answer.hits.length < limit || answer.hits.length >= answer.num_searched;
  more.dataset.limit = String(limit * MORE);
  const found = answer.hits.length === 1 ? "1 picture" : `${answer.hits.length} pictures`;
  const said = answer.hits.length
    ? `${found} of ${answer.num_searched} searched: ${answer.method}, ${time(answer.seconds)}.`
    : `Nothing fits among ${answer.num_searched} pictures searched.`;
  announce(said);
  return said;
}

function time(seconds) {
  const total = seconds.total ?? Object.values(seconds).reduce((sum, one) => sum + one, 0);
  return total < 0.995 ? `${Math.max(1, Math.round(1000 * total))} ms` : `${total.toFixed(1)} s`;
}

/** Return what stands in place of the search without an index. */
export const noIndex = () => [
  "No index is open here. ", element("code", {}, "openblip index FOLDER INDEX"),
  " makes one of your pictures; start the server with ", element("code", {}, "--index INDEX"), ".",
];
