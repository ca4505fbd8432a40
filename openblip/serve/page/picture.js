// The picture that is worked on: dropped, pasted, chosen, photographed, or taken from the index.

import { announce, byId } from "./dom.js";
import { show } from "./panel.js";

const PIXELATED_PX = 64; // pictures up to this side are shown enlarged, with their pixels visible
const SMALLER_SIDE_PX = 2048; // what is too large for the server is made smaller to this side

const shown = new EventTarget();
let current = null; // {blob, name, width, height, address}
let limits = {};
let isLatest = () => false;

/** Return the picture, or null: {blob, name, width, height, address}. */
export const picture = () => current;

/** Call back whenever another picture, or none, is shown. */
export const onPicture = (callback) => shown.addEventListener("change", () => callback(current));

export function setLimits(values) {
  limits = values ?? {};
}

/** Show drawn pictures of few pixels enlarged without smoothing. */
export function markPixelated(image, width, height) {
  image.classList.toggle("pixelated", Math.max(width, height) <= PIXELATED_PX);
}

/** Say that work needs a picture first, and go to where one is chosen. */
export function askForPicture(status) {
  show(status, "Choose a picture first.", { isError: true });
  byId("file").focus();
}

/** Take a picture into use; says in the picture's line what is wrong with it. Returns whether it is. */
export async function usePicture(blob, name) {
  const mine = Symbol("picture");
  isLatest = ((latest) => (one) => one === latest)(mine);
  const status = byId("picture-status");
  let decoded;
  try {
    decoded = await createImageBitmap(blob);
  } catch {
    show(status, `${name} is not a picture that this browser can open.`, { isError: true });
    return false;
  }
  const { width, height } = decoded;
  const isTooLarge =
    blob.size > (limits.max_upload_bytes ?? Infinity) || width * height > (limits.max_pixels ?? Infinity);
  const sent = isTooLarge ? await smaller(decoded) : blob;
  decoded.close();
  if (!isLatest(mine)) return false;
  if (current) URL.revokeObjectURL(current.address);
  current = { blob: sent, name, width, height, address: URL.createObjectURL(blob) };
  show(status, isTooLarge ? "It is larger than the server takes, so a smaller copy is sent." : "");
  draw();
  announce(`Picture ${name}, ${width} by ${height} pixels`);
  shown.dispatchEvent(new Event("change"));
  return true;
}

function smaller(bitmap) {
  const scale = Math.min(1, SMALLER_SIDE_PX / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(
    Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

function removePicture() {
  isLatest = () => false;
  if (current) URL.revokeObjectURL(current.address);
  current = null;
  show(byId("picture-status"), "");
  draw();
  announce("No picture");
  shown.dispatchEvent(new Event("change"));
  byId("file").focus();
}

function draw() {
  byId("drop").classList.toggle("has-picture", current !== null);
  byId("shown").hidden = !current;
  byId("no-picture").hidden = Boolean(current);
  byId("remove").hidden = !current;
  byId("file-label").textContent = current ? "Another picture" : "Choose a picture";
  const image = byId("shown-image");
  if (!current) {
    image.removeAttribute("src");
    return;
  }
  const { name, width, height } = current;
  image.src = current.address;
  image.alt = `The picture ${name}`;
  image.width = width;
  image.height = height;
  markPixelated(image, width, height);
  byId("shown").querySelector(".frame").style.setProperty("--shape", String(width / height));
  byId("shown-name").textContent = name;
  byId("shown-size").textContent = `${width} × ${height} px`;
}

function firstPicture(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

/** Listen for pictures: both choosers, drops anywhere on the page, and the clipboard. */
export function startPicture() {
  for (const id of ["file", "camera"]) {
    byId(id).addEventListener("change", (event) => {
      const [file] = event.target.files;
      if (file) usePicture(file, file.name);
      event.target.value = ""; // the same file can be chosen again
    });
  }
  byId("remove").addEventListener("click", removePicture);
  document.addEventListener("paste", (event) => {
    const file = firstPicture(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    usePicture(file, file.name || "pasted picture");
  });
  const mark = (isOver) => byId("drop").classList.toggle("is-over", isOver);
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) mark(false);
  });
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    mark(false);
    const file = firstPicture(event.dataTransfer);
    if (file) usePicture(file, file.name);
    else show(byId("picture-status"), "What was dropped is not a picture.", { isError: true });
  });
}
