// Shows reports and training curves of run folders, each in a frame that may run nothing.

import { address, call, fetchBlob, hasToken } from "./api.js";
import { byId, element } from "./dom.js";
import { show, waitingText } from "./panel.js";

let runs = null;
let saved = null; // the address of a page that was fetched with a token

/** Load the list of runs, and show the first page; does nothing once it is there. */
export async function openRuns() {
  if (runs) return;
  const status = document.querySelector("#view-runs > .status");
  show(status, "Loading …");
  try {
    const onWait = (seconds) => show(status, waitingText(seconds));
    ({ runs } = await call("v1/runs", { onWait }));
  } catch (error) {
    show(status, error.message, { isError: true, again: openRuns });
    return;
  }
  show(status, "");
  runs = runs.filter(({ pages }) => pages.length);
  const missing = document.querySelector("#view-runs > .missing");
  missing.hidden = runs.length > 0;
  byId("run-choice").hidden = !runs.length;
  if (!runs.length) {
    runs = null; // asked again when the tab is opened again
    missing.replaceChildren("No run is shown here. Start the server with ",
      element("code", {}, "--run FOLDER"), " to read the reports and training curves in a folder.");
    return;
  }
  byId("run-name").replaceChildren(...runs.map(({ name }, at) => element("option", { value: at }, name)));
  listPages();
}

function listPages() {
  const { pages } = runs[byId("run-name").value];
  byId("run-page").replaceChildren(...pages.map(({ title }, at) => element("option", { value: at }, title)));
  showPage();
}

async function showPage() {
  const { name, pages } = runs[byId("run-name").value];
  const { title, address: path } = pages[byId("run-page").value];
  const alone = byId("run-alone");
  if (saved) URL.revokeObjectURL(saved);
  saved = null;
  alone.removeAttribute("download");
  alone.textContent = "Open alone";
  if (!hasToken()) {
    alone.href = address(path);
    byId("run-frame").replaceChildren(element("iframe", {
      src: address(path), title: `${title} of ${name}`, sandbox: "", referrerpolicy: "no-referrer",
    }));
    return;
  }
  // A frame cannot send the token: the page is fetched with it, and read from a file.
  byId("run-frame").replaceChildren(element("p", { class: "note" },
    "With a token, a page is saved and opened from there."));
  saved = URL.createObjectURL(await fetchBlob(path));
  alone.href = saved;
  alone.setAttribute("download", `${name}-${path.split("/").pop()}`);
  alone.textContent = "Save the page";
}

export function startRuns() {
  byId("run-name").addEventListener("change", listPages);
  byId("run-page").addEventListener("change", showPage);
}
