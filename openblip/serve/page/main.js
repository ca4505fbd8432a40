// Starts the page: tabs, the switch between light and dark, the token, and what the models can do.

import { call, listen, request } from "./api.js";
import { announce, byId, element } from "./dom.js";
import { offerHeat, startHeat } from "./heat.js";
import { waitingText } from "./panel.js";
import { setLimits, startPicture } from "./picture.js";
import { openRuns, startRuns } from "./runs.js";
import { noIndex, startSearch } from "./search.js";
import { startAsk, startCaption, startClassify, startMatch } from "./verbs.js";

const RETRY_MS = 3000;
const TABS = ["pictures", "runs"];

let panels = {};
let isConnected = false;
let retry = null;

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  const isDark = () => {
    const { theme } = document.documentElement.dataset;
    return theme ? theme === "dark" : system.matches;
  };
  const draw = () => button.setAttribute("aria-checked", String(isDark()));
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("openblip-theme", theme);
    } catch {
      // Without storage the choice lasts until the page is left.
    }
    draw();
  });
  system.addEventListener("change", draw);
  draw();
}

function openTab(name, isFocused) {
  for (const one of TABS) {
    const tab = byId(`tab-${one}`);
    tab.setAttribute("aria-selected", String(one === name));
    tab.tabIndex = one === name ? 0 : -1;
    byId(`view-${one}`).hidden = one !== name;
  }
  if (isFocused) byId(`tab-${name}`).focus();
  history.replaceState(null, "", name === TABS[0] ? location.pathname : `#${name}`);
  if (name === "runs") openRuns();
}

function startTabs() {
  for (const name of TABS) byId(`tab-${name}`).addEventListener("click", () => openTab(name, false));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const at = TABS.findIndex((name) => byId(`tab-${name}`) === document.activeElement);
    const to = {
      ArrowRight: (at + 1) % TABS.length, ArrowLeft: (at + TABS.length - 1) % TABS.length,
      Home: 0, End: TABS.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    openTab(TABS[to], true);
  });
  if (TABS.includes(location.hash.slice(1))) openTab(location.hash.slice(1), false);
}

function notice(...content) {
  const box = byId("server-notice");
  box.replaceChildren(...content);
  box.hidden = !content.length;
}

/** Say that the server is gone, and look every few seconds whether it is back. */
function lost() {
  if (retry) return;
  const look = () => {
    clearTimeout(retry);
    retry = setTimeout(async () => {
      try {
        await request("healthz");
      } catch {
        look();
        return;
      }
      retry = null;
      notice();
      announce("The server is back.");
      if (!isConnected) connect();
    }, RETRY_MS);
  };
  notice("The server cannot be reached. This page looks for it every few seconds.");
  look();
}

/** Show the field for a token, and return the one that is given. */
function askForToken(isRefused) {
  const form = byId("token-form");
  form.querySelector("label").textContent = isRefused
    ? "The server does not know this token. Another one" : "This server asks for a token";
  form.hidden = false;
  const field = byId("token");
  field.value = "";
  field.focus();
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.hidden = true;
      resolve(field.value.trim());
    }, { once: true });
  });
}

const noModel = (what) => [`None of the models that are served here ${what}.`];

/** Ask what the server has, and offer what can be done with it. */
async function connect() {
  try {
    const { models, index, limits } = await call("v1/models", {
      onWait: (seconds) => (seconds ? notice(waitingText(seconds)) : notice()),
    });
    isConnected = true;
    setLimits(limits);
    offerHeat(models);
    panels.caption.offer(models, noModel("writes captions"));
    panels.match.offer(models, noModel("compares texts with pictures"));
    panels.classify.offer(models, noModel("compares labels with pictures"));
    panels.ask.offer(models, [
      "None of the models that are served here answers questions. ",
      element("code", {}, "openblip finetune vqa"), " makes one that does; start the server with a second ",
      element("code", {}, "--model"), " for it.",
    ]);
    panels.search.offer(models, noModel("has made this index"));
    if (!index) panels.search.setMissing(noIndex());
    byId("search-title").textContent = index
      ? `Search ${index.num_images.toLocaleString("en")} pictures` : "Search";
    document.documentElement.dataset.state = "ready";
  } catch (error) {
    if (retry) return; // the notice is there already
    notice(error.message, element("button", { type: "button", onclick: () => {
      notice();
      connect();
    } }, "Try again"));
  }
}

listen({ askForToken, onUnreachable: lost });
startTheme();
startHeat();
panels = {
  caption: startCaption(), ask: startAsk(), match: startMatch(), classify: startClassify(),
  search: startSearch(),
};
startPicture();
startRuns();
startTabs();
connect();
