// Chooses light or dark before anything is drawn, so this is a plain script that blocks, not a module.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("openblip-theme");
  } catch {
    // A browser that forbids storage follows the system's setting.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
