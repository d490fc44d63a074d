"use strict";
// Drawing: small SVG helpers, axes, and the five figures.
const NS = "http://www.w3.org/2000/svg";

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "style") node.style.cssText = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

function draw(parent, name, attributes = {}, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;
const points = (x) => { const t = (100 * x).toFixed(1); return Number(t) === 0 ? "0.0" : (x > 0 ? "+" : "−") + t.replace("-", ""); };
const pText = (p) => (p < 0.001 ? "< 0.001" : p.toFixed(p < 0.1 ? 3 : 2));
const seconds = (s) => (s >= 100 ? `${s.toFixed(0)} s` : s >= 1 ? `${s.toFixed(2)} s` : `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms`);
function bytes(b) {
  for (const [u, n] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (b >= u) return `${(b / u).toFixed(b / u < 10 ? 2 : b / u < 100 ? 1 : 0)} ${n}`;
  return `${b} B`;
}
const count = (n) => n.toLocaleString("en");

const tip = document.getElementById("tip");
function hover(node, text) {
  const show = (event) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const at = event.clientX !== undefined && event.type !== "focus" ? event : (() => { const r = node.getBoundingClientRect(); return { clientX: r.x + r.width / 2, clientY: r.y }; })();
    tip.style.left = `${Math.min(Math.max(at.clientX - box.width / 2, 8), innerWidth - box.width - 8)}px`;
    tip.style.top = `${at.clientY - box.height - 14 < 8 ? at.clientY + 18 : at.clientY - box.height - 14}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const kind of ["pointerenter", "pointermove", "focus"]) node.addEventListener(kind, show);
  for (const kind of ["pointerleave", "blur"]) node.addEventListener(kind, hide);
  return node;
}

function ticks(low, high, most = 5) {
  const span = high - low || 1;
  const raw = span / most, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * unit >= raw) * unit;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(12)));
  return found;
}

// A plot with axes; returns its svg and the two scales.
function frame(host, { width, height, x, y, xText, yText, xLabel, yLabel, left = 46, right = 12, top = 10, bottom = 38, xTicks, yTicks }) {
  const svg = draw(host, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const X = (v) => left + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - left - right);
  const Y = (v) => height - bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * (height - top - bottom);
  for (const v of yTicks || ticks(y[0], y[1], 4)) {
    draw(svg, "line", { x1: left, x2: width - right, y1: Y(v), y2: Y(v), class: "grid-line" });
    draw(svg, "text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end" }, yText(v));
  }
  draw(svg, "line", { x1: left, x2: width - right, y1: Y(y[0]), y2: Y(y[0]), class: "axis" });
  for (const v of xTicks || ticks(x[0], x[1], width < 420 ? 4 : 6)) draw(svg, "text", { x: X(v), y: height - bottom + 17, "text-anchor": "middle" }, xText(v));
  if (xLabel) draw(svg, "text", { x: width - right, y: height - 3, "text-anchor": "end" }, xLabel);
  if (yLabel) draw(svg, "text", { x: 0, y: top - 1 }, yLabel);
  return { svg, X, Y, left, right, top, bottom, width, height };
}

function marker(parent, shape, x, y, r, colour) {
  if (shape === "diamond") return draw(parent, "path", { d: `M${x} ${y - r * 1.25}L${x + r * 1.25} ${y}L${x} ${y + r * 1.25}L${x - r * 1.25} ${y}Z`, fill: colour, stroke: "var(--card)", "stroke-width": 1.5 });
  return draw(parent, "circle", { cx: x, cy: y, r, fill: colour, stroke: "var(--card)", "stroke-width": 1.5 });
}

function frontier(host, runs, measure, width) {
  const height = Math.max(290, Math.min(width * 0.62, 360));
  const xs = runs.map((r) => measure.of(r)), ys = runs.map((r) => r.accuracy.mean);
  const most = Math.max(...xs) || 1;
  const low = Math.min(...runs.map((r) => r.accuracy.low)), high = Math.max(...runs.map((r) => r.accuracy.high));
  const pad = Math.max((high - low) * 0.12, 0.01);
  const y = [Math.max(low - pad, 0), Math.min(high + pad, 1)];
  const plot = frame(host, { width, height, x: [0, most * 1.12], y, xText: measure.tick, yText: (v) => `${(100 * v).toFixed(y[1] - y[0] < 0.04 ? 1 : 0)} %`, xLabel: measure.label, top: 20, left: 50 });
  const { svg, X, Y } = plot;
  const order = runs.map((_, i) => i).sort((a, b) => xs[a] - xs[b] || ys[b] - ys[a]);
  let best = -1;
  const front = order.filter((i) => ys[i] > best && ((best = ys[i]), true));
  draw(svg, "path", { d: front.map((i, n) => `${n ? "L" : "M"}${X(xs[i])} ${Y(ys[i])}`).join(""), class: "front" });
  const taken = runs.map((_, i) => ({ x: X(xs[i]) - 8, y: Y(ys[i]) - 8, w: 16, h: 16 }));
  for (const i of order) {
    const r = runs[i], cx = X(xs[i]), cy = Y(ys[i]);
    draw(svg, "line", { x1: cx, x2: cx, y1: Y(r.accuracy.low), y2: Y(r.accuracy.high), stroke: r.colour, "stroke-width": 1.5, opacity: 0.55 });
    marker(svg, r.baseline ? "diamond" : "circle", cx, cy, 6, r.colour);
  }
  for (const i of [...order].reverse()) {
    const r = runs[i], cx = X(xs[i]), cy = Y(ys[i]), w = r.run.length * 6.4 + 4;
    const spots = [];
    for (const dy of [0, -15, 15, -29, 29, -43, 43, 57, -57]) { spots.push([cx + 12, cy + dy], [cx - 12 - w, cy + dy]); }
    const fits = ([sx, sy]) => sx >= plot.left - 30 && sx + w <= width && sy > 8 && sy < height - plot.bottom - 4 && !taken.some((b) => sx < b.x + b.w && sx + w > b.x && sy - 7 < b.y + b.h && sy + 7 > b.y);
    const spot = spots.find(fits);
    if (!spot) continue;
    taken.push({ x: spot[0], y: spot[1] - 7, w, h: 14 });
    const beside = spot[0] > cx;
    draw(svg, "text", { x: beside ? spot[0] : spot[0] + w, y: spot[1] + 4, class: "label", "text-anchor": beside ? "start" : "end" }, r.run);
  }
  for (const i of order) {
    const r = runs[i];
    hover(draw(svg, "circle", { cx: X(xs[i]), cy: Y(ys[i]), r: 14, class: "hit", tabindex: 0, "aria-label": r.run }), `${r.run}\n${percent(r.accuracy.mean)} right (${percent(r.accuracy.low)} to ${percent(r.accuracy.high)})\n${measure.text(xs[i])}`);
  }
}

function acceptanceChart(host, runs, width) {
  const height = 300, shown = runs.filter((r) => r.positions.length);
  const last = Math.max(...shown.flatMap((r) => r.positions.map((p) => p.last)));
  const least = Math.min(...shown.flatMap((r) => r.positions.map((p) => p.kept / p.drafted)));
  const bottom = Math.max(0, Math.floor(10 * least - 1) / 10);
  const plot = frame(host, { width, height, x: [0.5, last + 1.5], y: [bottom, 1], xText: (v) => v, yText: (v) => `${Math.round(100 * v)} %`, xLabel: "step", top: 12, xTicks: ticks(1, last + 1, width < 420 ? 6 : 10).filter((v) => v % 1 === 0 && v > 0) });
  for (const r of shown) {
    const at = (p) => plot.X((p.first + p.last) / 2 + 1);
    const share = (p) => p.kept / p.drafted;
    draw(plot.svg, "path", { d: r.positions.map((p, i) => `${i ? "L" : "M"}${at(p)} ${plot.Y(p.high)}`).join("") + [...r.positions].reverse().map((p) => `L${at(p)} ${plot.Y(Math.max(p.low, bottom))}`).join("") + "Z", fill: r.colour, opacity: 0.08 });
    draw(plot.svg, "path", { d: r.positions.map((p, i) => `${i ? "L" : "M"}${at(p)} ${plot.Y(share(p))}`).join(""), fill: "none", stroke: r.colour, "stroke-width": 2 });
    for (const p of r.positions) hover(marker(plot.svg, "circle", at(p), plot.Y(share(p)), 4, r.colour), `${r.run}, step ${p.first === p.last ? p.first + 1 : `${p.first + 1} to ${p.last + 1}`}\n${percent(share(p))} of ${count(p.drafted)} drafts kept whole\n(${percent(p.low)} to ${percent(p.high)})`);
  }
  host.append(legend(shown));
}

// Scores crowd below 1, so their axis is stretched: each decade of 1 - score is as wide.
const FLOOR = 1e-5;
const stretch = (c) => -Math.log10(Math.max(1 - c, FLOOR));

function calibrationChart(host, runs, score, width) {
  const height = 300;
  const shown = runs.map((r) => [r, r.calibration.find((c) => c.score === score)]).filter(([, c]) => c);
  const bins = shown.flatMap(([, c]) => c.bins);
  const low = Math.min(...bins.map((b) => stretch(b.confidence)), 0.3);
  const bottom = Math.max(0, Math.floor(10 * Math.min(...bins.map((b) => b.low), 0.9)) / 10);
  const marks = [0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999].filter((c) => stretch(c) >= low - 0.05 && (c > 0 || width > 440));
  const plot = frame(host, { width, height, x: [low - 0.1, 5.1], y: [bottom, 1], xText: (v) => (v >= 5 ? "1" : String(Number((1 - 10 ** -v).toPrecision(5)))), yText: (v) => `${Math.round(100 * v)} %`, xLabel: score === "min" ? "lowest score of a kept step" : "mean score of the kept steps", top: 12, xTicks: marks.map(stretch) });
  const X = (c) => plot.X(stretch(c));
  const ideal = Array.from({ length: 101 }, (_, i) => low + (i / 100) * (5 - low)).map((t) => [t, 1 - 10 ** -t]).filter(([, c]) => c >= bottom);
  draw(plot.svg, "path", { d: ideal.map(([t, c], i) => `${i ? "L" : "M"}${plot.X(t)} ${plot.Y(c)}`).join(""), class: "front", "stroke-dasharray": "4 4" });
  for (const [r, c] of shown) {
    draw(plot.svg, "path", { d: c.bins.map((b, i) => `${i ? "L" : "M"}${X(b.confidence)} ${plot.Y(b.right)}`).join(""), fill: "none", stroke: r.colour, "stroke-width": 2 });
    for (const b of c.bins) {
      draw(plot.svg, "line", { x1: X(b.confidence), x2: X(b.confidence), y1: plot.Y(Math.max(b.low, bottom)), y2: plot.Y(b.high), stroke: r.colour, opacity: 0.4 });
      hover(marker(plot.svg, "circle", X(b.confidence), plot.Y(b.right), 4, r.colour), `${r.run}\nscore about ${b.confidence.toPrecision(5)}: ${percent(b.right)} right\nof ${count(b.items)} items (${percent(b.low)} to ${percent(b.high)})`);
    }
  }
  host.append(legend(shown.map(([r, c]) => ({ ...r, note: `error ${percent(c.error)}${c.auroc === null ? "" : `, AUROC ${c.auroc.toFixed(2)}`}` }))));
}

function timelines(host, runs, slices) {
  const grid = el("div", { class: "minis" });
  host.append(grid);
  for (const r of runs) {
    const names = Object.keys(r.timeline.tokens).sort((a, b) => slices.order(a) - slices.order(b));
    if (!names.length) continue;
    const bins = r.timeline.tokens[names[0]].length, span = r.timeline.span;
    const totals = Array.from({ length: bins }, (_, i) => names.reduce((s, n) => s + r.timeline.tokens[n][i], 0) / span);
    const cell = el("div", {}, el("h4", {}, r.run));
    grid.append(cell);
    const plot = frame(cell, { width: 300, height: 132, x: [0, bins * span], y: [0, Math.max(...totals, 1) * 1.05], xText: (v) => `${v} s`, yText: count, top: 8, bottom: 24, left: 42, right: 6, xTicks: ticks(0, bins * span, 4), yTicks: ticks(0, Math.max(...totals, 1), 2) });
    let base = new Array(bins).fill(0);
    for (const n of names) {
      const tops = base.map((b, i) => b + r.timeline.tokens[n][i] / span);
      const edge = (v, i) => `L${plot.X(i * span)} ${plot.Y(v)}L${plot.X((i + 1) * span)} ${plot.Y(v)}`;
      const path = `M${plot.X(0)} ${plot.Y(0)}` + tops.map(edge).join("") + base.map((v, i) => [v, i]).reverse().map(([v, i]) => `L${plot.X((i + 1) * span)} ${plot.Y(v)}L${plot.X(i * span)} ${plot.Y(v)}`).join("") + "Z";
      hover(draw(plot.svg, "path", { d: path, fill: slices.colour(n), opacity: 0.9 }), `${r.run}: ${n}\n${count(r.timeline.tokens[n].reduce((a, b) => a + b, 0))} tokens kept`);
      base = tops;
    }
  }
  host.append(slices.legend(new Set(runs.flatMap((r) => Object.keys(r.timeline.tokens)))));
}

function legend(runs) {
  return el("div", { class: "legend" }, ...runs.map((r) => el("span", { class: "key" }, el("i", { style: `background:${r.colour}` }), r.note ? `${r.run}: ${r.note}` : r.run)));
}
