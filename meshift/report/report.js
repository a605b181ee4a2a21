// What the page can do beyond being read: values under the pointer, logarithmic axes, the theme.
"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
    });
  }

  const short = (value) => {
    if (value === null || value === undefined) return "\u2013";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return text.replace(/-/g, "\u2212");
  };
  const spaced = (x, count) =>
    x.length === count ? x : Array.from({ length: count }, (_, i) => x[0] + (i * (x[1] - x[0])) / (count - 1));
  const nearest = (xs, x) => {
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
    return best;
  };

  const lineReader = (figure) => {
    const [low, high] = figure.dataset.span.split(",").map(Number);
    const lines = JSON.parse(figure.dataset.lines).map((l) => ({ name: l.n, x: spaced(l.x, l.y.length), y: l.y }));
    return (part) => {
      const wanted = low + part * (high - low);
      const found = lines.filter((l) => l.x.length).map((l) => ({ l, i: nearest(l.x, wanted) }));
      if (!found.length) return null;
      const closest = found.reduce((a, b) => (Math.abs(b.l.x[b.i] - wanted) < Math.abs(a.l.x[a.i] - wanted) ? b : a));
      const step = closest.l.x[closest.i];
      const here = found.filter((f) => f.l.x[f.i] === step);
      const values = here.map((f) => (f.l.name && lines.length > 1 ? f.l.name + " " : "") + short(f.l.y[f.i]));
      return { part: high > low ? (step - low) / (high - low) : 0.5, text: "step " + step + ": " + values.join(", ") };
    };
  };
  const stackReader = (figure) => {
    const data = JSON.parse(figure.dataset.stack);
    return (part) => {
      const i = Math.min(data.x.length - 1, Math.floor(part * data.x.length));
      const total = data.calls.reduce((sum, c) => sum + c[1][i], 0);
      const largest = data.calls.map((c) => [c[0], c[1][i]]).sort((a, b) => b[1] - a[1]).slice(0, 3);
      const parts = largest.map((c) => c[0] + " " + short(c[1])).join(", ");
      return { part: (i + 0.5) / data.x.length, text: "step " + data.x[i] + ": " + short(total) + " s (" + parts + ")" };
    };
  };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const read = figure.querySelector(".read");
    const resting = read.textContent;
    let reader = null;
    for (const box of figure.querySelectorAll(".box")) {
      const area = box.querySelector(".paths");
      const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("y2", "100%");
      cursor.setAttribute("visibility", "hidden");
      box.append(cursor);
      box.addEventListener("pointermove", (event) => {
        reader = reader || (figure.dataset.lines ? lineReader(figure) : stackReader(figure));
        const frame = area.getBoundingClientRect();
        const found = reader(Math.min(1, Math.max(0, (event.clientX - frame.left) / frame.width)));
        if (!found) return;
        for (const end of ["x1", "x2"]) cursor.setAttribute(end, 100 * found.part + "%");
        cursor.setAttribute("visibility", "visible");
        read.textContent = found.text;
      });
      box.addEventListener("pointerleave", () => {
        cursor.setAttribute("visibility", "hidden");
        read.textContent = resting;
      });
    }
    const log = figure.querySelector(".switch");
    if (log) {
      log.hidden = false;
      log.addEventListener("click", () => log.setAttribute("aria-pressed", figure.classList.toggle("logarithmic")));
    }
  }
})();
