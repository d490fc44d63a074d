// The page around the figures: tables, theme, and what is drawn where.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

const slices = {
  names: data.slices,
  order: (n) => { const i = data.slices.findIndex((s) => s.name === n); return i < 0 ? 99 : i; },
  colour: (n) => data.slices.find((s) => s.name === n)?.colour || "#8a919c",
  ink: (n) => data.slices.find((s) => s.name === n)?.ink || "var(--soft)",
  legend: (shown) => el("div", { class: "legend" }, ...data.slices.filter((s) => shown.has(s.name)).map((s) => el("span", { class: "key" }, el("i", { style: `background:${s.colour}` }), s.name))),
};
const runs = data.runs;

document.title = `${data.title} · cascade`;
$("title").textContent = data.title;
$("subtitle").textContent = data.subtitle;
$("manifest").textContent = JSON.stringify(data.manifest, null, 1);

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

function shareBar(shares) {
  const names = Object.keys(shares).sort((a, b) => slices.order(a) - slices.order(b));
  if (!names.length) return el("span", { class: "dim" }, "–");
  return el("div", {},
    el("div", { class: "bar", "aria-hidden": true }, ...names.map((n) => el("i", { style: `width:${100 * shares[n]}%;background:${slices.colour(n)}` }))),
    el("div", { class: "legend" }, ...names.map((n) => el("span", { class: "key" }, el("i", { style: `background:${slices.colour(n)}` }), `${n} ${percent(shares[n], 0)}`))));
}

function runsTable() {
  const low = Math.min(...runs.map((r) => r.accuracy.low)), span = Math.max(...runs.map((r) => r.accuracy.high)) - low || 1;
  const head = ["Run", "Right", data.reference ? `Against ${data.reference}` : null, "Time a problem", "Latency", "Weights read", "Kept tokens by slice", runs.some((r) => r.failed) ? "Failed" : null];
  const heads = head.map((h, i) => (h === null ? null : el("th", { scope: "col", class: i === 4 ? "num opt" : i === 3 || i === 5 || i === 7 ? "num" : null }, h)));
  const rows = runs.map((r) => {
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("class", "ci"); svg.setAttribute("viewBox", "0 0 128 16"); svg.setAttribute("aria-hidden", "true");
    const X = (v) => 4 + ((v - low) / span) * 120;
    draw(svg, "line", { x1: X(r.accuracy.low), x2: X(r.accuracy.high), y1: 8, y2: 8, stroke: r.colour, "stroke-width": 2, opacity: 0.5 });
    marker(svg, r.baseline ? "diamond" : "circle", X(r.accuracy.mean), 8, 4.5, r.colour);
    const dot = document.createElementNS(NS, "svg");
    dot.setAttribute("width", 14); dot.setAttribute("height", 14);
    marker(dot, r.baseline ? "diamond" : "circle", 7, 7, 5, r.colour);
    const a = data.against[r.run];
    const versus = !data.reference ? null : el("td", { "data-label": `Against ${data.reference}` }, ...(a ? [el("span", { class: "big" }, points(a.difference.mean)), el("span", { class: "dim" }, ` (${points(a.difference.low)} to ${points(a.difference.high)})`), el("div", { class: "dim" }, `p ${a.adjusted < 0.001 ? "" : "= "}${pText(a.adjusted)}`)] : [el("span", { class: "dim" }, "reference")]));
    return el("tr", {},
      el("th", { scope: "row" }, el("div", { class: "name" }, dot, el("div", {}, r.run, r.baseline ? el("div", { class: "tag" }, "baseline") : null))),
      el("td", { "data-label": "Right" }, el("span", { class: "big" }, percent(r.accuracy.mean)), el("span", { class: "dim" }, ` (${(100 * r.accuracy.low).toFixed(1)} to ${(100 * r.accuracy.high).toFixed(1)})`), svg),
      versus,
      el("td", { class: "num", "data-label": "Time a problem" }, seconds(r.seconds / Math.max(r.items, 1)), el("div", { class: "dim" }, `${r.per_second.toFixed(1)} a second`)),
      el("td", { class: "num opt", "data-label": "Latency" }, seconds(r.latency.p50), el("div", { class: "dim" }, `95 %: ${seconds(r.latency.p95)}`)),
      el("td", { class: "num", "data-label": "Weights read" }, bytes(r.bytes), el("div", { class: "dim" }, `${r.tokens.toFixed(0)} tokens kept`)),
      el("td", { class: "who", "data-label": "Kept tokens by slice" }, shareBar(r.share)),
      runs.some((q) => q.failed) ? el("td", { class: "num", "data-label": "Failed" }, r.failed ? el("span", { style: "color:var(--bad)" }, count(r.failed)) : "0") : null);
  });
  $("runs").append(el("thead", {}, el("tr", {}, ...heads.filter(Boolean))), el("tbody", {}, ...rows));
  const missing = runs.filter((r) => r.items < data.problems.length);
  $("runs-note").textContent = "Right: share of problems, with its 95 % bootstrap interval" + (data.reference ? `; against ${data.reference}: difference in points, with the interval and Holm-adjusted p of a paired test` : "") + ". Time a problem: wall time of the run over its problems. Latency: median of single requests, which ran among others. Weights read: bytes for one problem if it ran alone."
    + (missing.length ? ` Unfinished: ${missing.map((r) => `${r.run}: ${count(r.items)} of ${count(data.problems.length)}`).join(", ")}.` : "");
}

function kindsTable() {
  const kinds = [...new Set(runs.flatMap((r) => Object.keys(r.by_kind)))];
  if (kinds.length < 2) return;
  $("kinds-section").hidden = false;
  const cell = (r, k) => {
    const found = r.by_kind[k];
    if (!found) return el("td", { class: "num" }, "–");
    return el("td", { class: "num" }, hover(el("span", { class: "heat", style: `background:color-mix(in srgb, var(--good) ${Math.round(found[1] * found[1] * 34)}%, transparent)` }, percent(found[1])), `${r.run} on ${k}\n${percent(found[1])} of ${count(found[0])} problems`));
  };
  $("kinds").append(el("thead", {}, el("tr", {}, el("th", {}, "Kind"), ...runs.map((r) => el("th", { class: "num" }, r.run)))),
    el("tbody", {}, ...kinds.map((k) => el("tr", {}, el("th", { scope: "row" }, k || "–"), ...runs.map((r) => cell(r, k))))));
}

function pairsTable() {
  if (!data.pairs.length) { $("pairs-details").parentElement.hidden = true; return; }
  $("pairs").append(
    el("thead", {}, el("tr", {}, ...["First", "Second", "Difference", "95 %", "First better", "Second better", "p"].map((h, i) => el("th", { class: i > 1 ? "num" : null }, h)))),
    el("tbody", {}, ...data.pairs.map((c) => el("tr", {}, el("td", {}, c.first), el("td", {}, c.second), el("td", { class: "num" }, points(c.difference.mean)), el("td", { class: "num dim" }, `${points(c.difference.low)} to ${points(c.difference.high)}`), el("td", { class: "num" }, count(c.better)), el("td", { class: "num" }, count(c.worse)), el("td", { class: "num" }, pText(c.adjusted))))));
}

const TIMES = {
  problem: { name: "wall time", of: (r) => r.seconds / Math.max(r.items, 1), label: "seconds a problem", tick: (v) => String(v), text: (v) => `${seconds(v)} a problem` },
  latency: { name: "median latency", of: (r) => r.latency.p50, label: "seconds a request, median", tick: (v) => String(v), text: (v) => `median latency ${seconds(v)}` },
  p95: { name: "95 % latency", of: (r) => r.latency.p95, label: "seconds a request, 95 % quantile", tick: (v) => String(v), text: (v) => `95 % of requests within ${seconds(v)}` },
};
const verifier = data.slices[data.slices.length - 1]?.name;
const COSTS = {
  bytes: { name: "weights read", of: (r) => r.bytes, label: "weights read a problem", tick: bytes, text: (v) => `${bytes(v)} of weights a problem` },
  passes: { name: `${verifier} passes`, of: (r) => r.passes[verifier] || 0, label: `forward passes of ${verifier} a problem`, tick: (v) => String(v), text: (v) => `${v.toFixed(1)} passes of ${verifier} a problem` },
  tokens: { name: "kept tokens", of: (r) => r.tokens, label: "kept tokens a problem", tick: (v) => String(v), text: (v) => `${v.toFixed(1)} tokens a problem` },
};

// A card with a figure that is drawn anew when its width or its choice changes.
function figure(title, caption, options, paint, wide = false) {
  const host = el("div", { class: "plot" });
  const choice = options && el("select", { "aria-label": `${title}: what is shown` }, ...Object.entries(options).map(([k, o]) => el("option", { value: k }, o.name)));
  const card = el("figure", { class: `card${wide ? " wide" : ""}` }, el("figcaption", {}, el("div", {}, el("h3", {}, title), el("p", {}, caption)), choice), host);
  let width = 0;
  const redraw = () => { if (!width) return; host.replaceChildren(); paint(host, width, choice ? choice.value : null); host.querySelector("svg")?.setAttribute("aria-label", title); };
  choice?.addEventListener("change", redraw);
  new ResizeObserver(([entry]) => { const now = Math.round(entry.contentRect.width); if (now && Math.abs(now - width) > 4) { width = now; redraw(); } }).observe(host);
  $("figures").append(card);
}

runsTable();
kindsTable();
pairsTable();
if (runs.length) {
  figure("Accuracy against time", "Up and to the left is better; the line joins the runs that no other beats in both.", TIMES, (host, width, choice) => frontier(host, runs, TIMES[choice], width));
  figure("Accuracy against cost", "What a problem costs wherever it runs, however many run beside it.", COSTS, (host, width, choice) => frontier(host, runs, COSTS[choice], width));
  if (runs.some((r) => r.positions.length)) figure("Acceptance by step", "Of the steps drafted at each place in the reasoning, how many were kept whole.", null, (host, width) => acceptanceChart(host, runs, width));
  if (runs.some((r) => r.calibration.length)) figure("Calibration", "Items by the verifier’s score of the steps it let pass: how many are right. On the dashed line a score is a probability.", { min: { name: "lowest score" }, mean: { name: "mean score" } }, (host, width, choice) => calibrationChart(host, runs, choice, width));
  figure("Tokens over time", "Kept tokens a second by the slice that wrote them, over the wall time of each run.", null, (host) => timelines(host, runs, slices), true);
}
