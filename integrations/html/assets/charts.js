"use strict";
/* Charts over steps, drawn by uPlot. Colours come from the page's style, so that they follow light and dark. */
const redline = {
  colour: (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim(),
  drawn: [],

  number(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  },

  said(figure) {
    const line = document.createElement("p");
    line.className = "said";
    figure.append(line);
    return line;
  },

  empty(figure) {
    const line = document.createElement("p");
    line.className = "empty";
    line.textContent = "Not measured in this run.";
    figure.append(line);
  },

  severity: (action) => (action === "scale" || action === "decay" ? "amber" : "red"),

  /* One chart into a figure; gives a function that takes it away again. */
  chart(figure, spec, height) {
    if (!spec.lines.length) {
      redline.empty(figure);
      return () => {};
    }
    const place = document.createElement("div");
    figure.append(place);
    const said = spec.marks.length ? redline.said(figure) : null;
    const positive = (values) => (spec.log ? values.map((value) => (value > 0 ? value : null)) : values);
    const data = uPlot.join(spec.lines.map((line) => [line.x, positive(line.y)]));
    const width = () => Math.max(place.clientWidth, 200);
    const axis = (more) => ({
      stroke: () => redline.colour("dim"),
      grid: { stroke: () => redline.colour("grid"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
      ...more,
    });
    const plot = new uPlot(
      {
        width: width(),
        height: height || 260,
        cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false }, points: { size: 6 } },
        scales: { x: { time: false }, y: redline.scale(spec) },
        axes: [
          axis({ label: "step", labelSize: 18, labelFont: "12px system-ui, sans-serif", size: 34,
                 values: (_, splits) => splits.map((step) => step.toLocaleString("en")) }),
          axis({ label: spec.unit || undefined, labelSize: spec.unit ? 18 : 0, labelFont: "12px system-ui, sans-serif",
                 size: 56, values: (_, splits) => splits.map((value) => (value === null ? "" : redline.number(value))) }),
        ],
        series: [
          { label: "step", value: (_, step) => (step === null ? "–" : step.toLocaleString("en")) },
          ...spec.lines.map((line) => ({
            label: line.name,
            stroke: () => redline.colour("c" + (line.colour % 8)),
            width: 1.6,
            dash: line.dashed ? [5, 4] : undefined,
            points: { show: line.x.length < 60, size: 4, fill: () => redline.colour("c" + (line.colour % 8)) },
            value: (_, value) => redline.number(value),
          })),
        ],
        hooks: {
          drawClear: [(u) => spec.redline && redline.shade(u)],
          draw: [(u) => spec.redline && redline.limit(u), (u) => redline.marks(u, spec.marks)],
          setCursor: [(u) => said && redline.tell(u, spec.marks, said)],
        },
      },
      data,
      place,
    );
    const resize = new ResizeObserver(() => plot.setSize({ width: width(), height: height || 260 }));
    resize.observe(figure);
    redline.drawn.push(plot);
    return () => {
      resize.disconnect();
      redline.drawn.splice(redline.drawn.indexOf(plot), 1);
      plot.destroy();
      place.remove();
    };
  },

  scale(spec) {
    if (!spec.log) return {};
    return {
      distr: 3,
      range: (_, low, high) => {
        if (low === null || high === null) return [0.1, 10];
        return spec.redline
          ? uPlot.rangeLog(Math.min(low, 0.5), Math.max(high, 2), 10, false)
          : uPlot.rangeLog(low, high, 10, false);
      },
    };
  },

  /* Over the redline the ground is red. */
  shade(u) {
    const { left, top, width } = u.bbox;
    const at = Math.min(Math.max(u.valToPos(1, "y", true), top), top + u.bbox.height);
    u.ctx.save();
    u.ctx.fillStyle = redline.colour("shade");
    u.ctx.fillRect(left, top, width, at - top);
    u.ctx.restore();
  },

  limit(u) {
    const { left, width } = u.bbox;
    const at = u.valToPos(1, "y", true);
    u.ctx.save();
    u.ctx.strokeStyle = u.ctx.fillStyle = redline.colour("red");
    u.ctx.lineWidth = 1.5 * devicePixelRatio;
    u.ctx.beginPath();
    u.ctx.moveTo(left, at);
    u.ctx.lineTo(left + width, at);
    u.ctx.stroke();
    u.ctx.font = `600 ${11 * devicePixelRatio}px system-ui, sans-serif`;
    u.ctx.textAlign = "left";
    u.ctx.fillText("redline", left + 6 * devicePixelRatio, at - 5 * devicePixelRatio);
    u.ctx.restore();
  },

  /* What the controllers did: a tick at the foot of the chart, and a thin line up from it. */
  marks(u, marks) {
    const { left, top, width, height } = u.bbox;
    u.ctx.save();
    u.ctx.lineWidth = devicePixelRatio;
    for (const mark of marks) {
      const at = u.valToPos(mark.step, "x", true);
      if (at < left || at > left + width) continue;
      u.ctx.strokeStyle = u.ctx.fillStyle = redline.colour(redline.severity(mark.action));
      u.ctx.globalAlpha = marks.length > 60 ? 0.12 : 0.3;
      u.ctx.beginPath();
      u.ctx.moveTo(at, top);
      u.ctx.lineTo(at, top + height);
      u.ctx.stroke();
      u.ctx.globalAlpha = 0.9;
      const size = 4 * devicePixelRatio;
      u.ctx.beginPath();
      u.ctx.moveTo(at, top + height - 2 * size);
      u.ctx.lineTo(at - size, top + height);
      u.ctx.lineTo(at + size, top + height);
      u.ctx.fill();
    }
    u.ctx.restore();
  },

  /* The mark nearest to the pointer, in words. */
  tell(u, marks, line) {
    const at = u.cursor.left;
    if (at === undefined || at < 0) {
      line.textContent = "";
      return;
    }
    let nearest = null;
    let distance = 12;
    for (const mark of marks) {
      const away = Math.abs(u.valToPos(mark.step, "x") - at);
      if (away < distance) [nearest, distance] = [mark, away];
    }
    line.textContent = nearest ? `step ${nearest.step.toLocaleString("en")} · ${nearest.text}` : "";
  },
};
