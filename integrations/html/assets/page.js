"use strict";
/* Draws every figure of the page from its data, and says so on the root element: data-charts, and data-error if one
   failed. Opened with #check, it also counts what each canvas holds that is not blank, as data-ink, and by how many
   pixels the page is wider than the window, as data-overflow. */
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("data").textContent);
  window.addEventListener("error", (event) => (root.dataset.error = event.message));
  let drawn = 0;
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const spec = specs[figure.dataset.chart];
    (spec.kind === "layers" ? redline.layers : redline.chart)(figure, spec);
    drawn += 1;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const one of redline.drawn) one.redraw();
  });
  const ink = (canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let filled = 0;
    for (let at = 3; at < data.length; at += 4) filled += data[at] > 0;
    return filled;
  };
  setTimeout(() => {
    if (location.hash === "#check") {
      for (const canvas of document.querySelectorAll("figure canvas")) canvas.dataset.ink = ink(canvas);
      root.dataset.overflow = Math.max(root.scrollWidth - innerWidth, 0);
    }
    root.dataset.charts = drawn;
  }, 50);
})();
