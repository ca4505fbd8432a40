// Starts the page: tabs, the switch between light and dark, and what the server's models can do.

import { byId } from "./dom.js";

byId("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
});
