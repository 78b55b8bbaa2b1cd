"use strict";
/* A heat map of layers over steps on a canvas, and lines of some of the layers below it. */
redline.ramps = {
  size: { light: ["#f3efe6", "#e9c46a", "#d9772f", "#a3262a", "#4a0d24"], dark: ["#23282d", "#5a4a2a", "#b8742c", "#e0533f", "#ffd9b0"] },
  growth: { light: ["#2b6aa3", "#a9c8de", "#f4f1ea", "#e8a98f", "#b3262e"], dark: ["#5fb0ee", "#2f5877", "#262b30", "#7d3f36", "#f2655c"] },
};
redline.ramps.ratio = redline.ramps.growth;

redline.dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

redline.mixed = (ramp, at) => {
  const stops = ramp[redline.dark() ? "dark" : "light"];
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const channel = (colour, n) => parseInt(colour.slice(1 + 2 * n, 3 + 2 * n), 16);
  const mix = [0, 1, 2].map((n) => {
    const from = channel(stops[low], n);
    return Math.round(from + (place - low) * (channel(stops[low + 1], n) - from));
  });
  return `rgb(${mix.join(",")})`;
};

/* How a value becomes a place on the ramp, and what stands at the ramp's ends. */
redline.heatScale = (quantity) => {
  const first = quantity.rows.map((row) => row.find((value) => value > 0) ?? null);
  const against = (row) => (quantity.scale === "growth" ? first[row] : 1);
  const size = (value, row) => (value > 0 && against(row) ? Math.log2(value / against(row)) : null);
  const sizes = quantity.rows.flatMap((row, n) => row.map((value) => size(value, n))).filter((one) => one !== null);
  let low = sizes.reduce((one, other) => Math.min(one, other), Infinity);
  let high = sizes.reduce((one, other) => Math.max(one, other), -Infinity);
  if (!sizes.length) [low, high] = [0, 1];
  if (quantity.scale !== "size") {
    high = Math.max(Math.abs(low), Math.abs(high), 0.1);
    low = -high;
  } else if (high - low < 0.5) {
    [low, high] = [low - 0.25, high + 0.25];
  }
  const sign = quantity.scale === "growth" || quantity.scale === "ratio" ? "×" : "";
  return {
    place: (value, row) => (size(value, row) === null ? null : (size(value, row) - low) / (high - low)),
    low: sign + redline.number(2 ** low),
    high: sign + redline.number(2 ** high),
    words: { size: "", growth: "against the layer's first", ratio: "B over A" }[quantity.scale],
    relative: (value, row) => (quantity.scale === "growth" && against(row) ? value / against(row) : null),
  };
};

redline.short = (context, name, room) => {
  let shown = name.replace(/\.weight(?=\[|$)/, "");
  while (shown.length > 4 && context.measureText(shown).width > room) shown = "…" + shown.slice(2);
  return shown;
};

redline.heat = (figure, quantity) => {
  const canvas = document.createElement("canvas");
  canvas.className = "heat";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${quantity.title}: layers from top to bottom, steps from left to right`);
  const legend = document.createElement("div");
  legend.className = "scale";
  const said = document.createElement("p");
  said.className = "said";
  figure.append(canvas, legend, said);
  const scale = redline.heatScale(quantity);
  const ramp = redline.ramps[quantity.scale];
  const many = quantity.layers.length;
  const tall = many > 60 ? 8 : many > 24 ? 13 : 20;
  const foot = 22;
  let names = 0;
  let wide = 0;

  const draw = () => {
    const density = devicePixelRatio || 1;
    wide = Math.max(figure.clientWidth - 30, 200);
    names = wide < 480 ? 116 : 200;
    canvas.width = wide * density;
    canvas.height = (many * tall + foot) * density;
    canvas.style.height = many * tall + foot + "px";
    const context = canvas.getContext("2d");
    context.scale(density, density);
    context.font = `${Math.min(tall - 1, 12)}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    const column = (wide - names) / quantity.x.length;
    quantity.rows.forEach((row, n) => {
      row.forEach((value, at) => {
        const place = value === null ? null : scale.place(value, n);
        context.fillStyle = place === null ? redline.colour("grid") : redline.mixed(ramp, place);
        context.fillRect(names + at * column, n * tall, column + 0.6, tall - 1);
      });
      if (tall > 8) {
        context.fillStyle = redline.colour("ink");
        context.textAlign = "right";
        context.fillText(redline.short(context, quantity.layers[n], names - 12), names - 8, n * tall + tall / 2);
      }
    });
    context.fillStyle = redline.colour("dim");
    context.font = "12px system-ui, sans-serif";
    const ticks = Math.min(quantity.x.length, wide < 480 ? 3 : 6);
    for (let tick = 0; tick < ticks; tick++) {
      const at = ticks < 2 ? 0 : Math.round((tick * (quantity.x.length - 1)) / (ticks - 1));
      context.textAlign = tick === 0 ? "left" : tick === ticks - 1 ? "right" : "center";
      const left = names + (tick === 0 ? 0 : tick === ticks - 1 ? wide - names : (at + 0.5) * column);
      context.fillText(quantity.x[at].toLocaleString("en"), left, many * tall + 12);
    }
    context.textAlign = "right";
    context.fillText("step", names - 8, many * tall + 12);
    redline.heatLegend(legend, ramp, scale);
  };

  const tell = (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / tall);
    const column = Math.floor(((event.clientX - box.left - names) / (wide - names)) * quantity.x.length);
    const value = quantity.rows[row]?.[Math.max(column, 0)];
    if (row < 0 || row >= many || column >= quantity.x.length || value === undefined) {
      said.textContent = "";
      return;
    }
    const at = quantity.x[Math.max(column, 0)].toLocaleString("en");
    const relative = value === null ? null : scale.relative(value, row);
    const growth = relative === null ? "" : `, ×${redline.number(relative)} of the first`;
    said.textContent = `${quantity.layers[row]} · step ${at} · ${quantity.title} ${redline.number(value)}${growth}`;
  };
  canvas.addEventListener("pointermove", tell);
  canvas.addEventListener("pointerdown", tell);
  canvas.addEventListener("pointerleave", () => (said.textContent = ""));
  const resize = new ResizeObserver(draw);
  resize.observe(figure);
  const shown = { redraw: draw };
  redline.drawn.push(shown);
  draw();
  return () => {
    resize.disconnect();
    redline.drawn.splice(redline.drawn.indexOf(shown), 1);
    for (const one of [canvas, legend, said]) one.remove();
  };
};

redline.heatLegend = (legend, ramp, scale) => {
  legend.replaceChildren();
  const bar = document.createElement("canvas");
  [bar.width, bar.height] = [160, 10];
  const context = bar.getContext("2d");
  for (let at = 0; at < 160; at++) {
    context.fillStyle = redline.mixed(ramp, at / 159);
    context.fillRect(at, 0, 1, 10);
  }
  legend.append(scale.low, bar, scale.high);
  if (scale.words) legend.append(` ${scale.words}`);
};

/* The quantities to choose from, the heat map of the one chosen, and its lines. */
redline.layers = (figure, spec) => {
  if (!spec.quantities.length) {
    redline.empty(figure);
    return;
  }
  const choice = document.createElement("div");
  choice.className = "choice";
  const note = document.createElement("p");
  note.className = "note";
  figure.append(choice, note);
  let takeAway = [];
  const show = (quantity) => {
    for (const one of takeAway) one();
    for (const button of choice.children) button.setAttribute("aria-pressed", String(button.textContent === quantity.title));
    note.textContent = quantity.note;
    const lines = quantity.layers
      .map((name, n) => ({ name, n }))
      .filter((one) => spec.lines.includes(one.name))
      .map(({ name, n }, place) => ({ name, x: quantity.x, y: quantity.rows[n], colour: place, dashed: false }));
    takeAway = [
      redline.heat(figure, quantity),
      redline.chart(figure, { lines, unit: quantity.title, log: true, redline: false, marks: [] }, 240),
    ];
  };
  for (const quantity of spec.quantities) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = quantity.title;
    button.addEventListener("click", () => show(quantity));
    choice.append(button);
  }
  show(spec.quantities[0]);
};
