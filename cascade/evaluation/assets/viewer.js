// The trace viewer: a list of problems, and the steps of one of them under one run.
const view = { shown: [], at: -1, run: Math.max(runs.findIndex((r) => !r.baseline), 0), blocks: new Map() };
const list = $("list"), trace = $("trace"), search = $("search"), filter = $("filter"), sort = $("sort");

const item = (r, i) => data.items[r][i]; // [score, tokens, seconds, failed, retracted, lowest] or null
const FILTERS = {
  all: ["all problems", () => true],
  wrong: ["wrong in this run", (i) => item(view.run, i) && item(view.run, i)[0] < 1],
  right: ["right in this run", (i) => item(view.run, i) && item(view.run, i)[0] >= 1],
  differ: ["runs disagree", (i) => new Set(runs.map((_, r) => item(r, i)?.[0] ?? -1)).size > 1],
  retracted: ["dropped drafts", (i) => item(view.run, i)?.[4]],
  failed: ["failed", (i) => runs.some((_, r) => item(r, i)?.[3])],
};
const SORTS = {
  number: ["in order", () => 0],
  slow: ["slowest first", (i) => -(item(view.run, i)?.[2] ?? 0)],
  long: ["longest first", (i) => -(item(view.run, i)?.[1] ?? 0)],
  doubt: ["lowest score first", (i) => item(view.run, i)?.[5] ?? 2],
};
for (const [key, [name]] of Object.entries(FILTERS)) filter.append(el("option", { value: key }, name));
for (const [key, [name]] of Object.entries(SORTS)) sort.append(el("option", { value: key }, name));

function mark(r, i) {
  const found = item(r, i);
  const state = !found ? "missing" : found[0] >= 1 ? "" : found[0] > 0 ? "part" : "wrong";
  const said = !found ? "not finished" : found[3] ? "failed" : found[0] >= 1 ? "right" : found[0] > 0 ? `score ${found[0]}` : "wrong";
  return el("span", { class: `mark ${state}`, title: `${runs[r].run}: ${said}` });
}

const texts = data.problems.map((p) => `${p.id}\n${p.question}\n${p.answer}\n${p.kind}`.toLowerCase());

// The list anew. `keep` stays open where it still matches, or with `stay` in any case.
function refresh(keep, stay = false) {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const [, passes] = FILTERS[filter.value], [, rank] = SORTS[sort.value];
  view.shown = data.problems.map((_, i) => i).filter((i) => (stay && i === keep) || (passes(i) && words.every((w) => texts[i].includes(w))));
  view.shown = view.shown.map((i) => [rank(i), i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, i]) => i);
  const rows = document.createDocumentFragment();
  view.shown.forEach((i) => {
    const p = data.problems[i];
    rows.append(el("li", { role: "option", id: `o${i}`, "aria-selected": "false", onclick: () => open(view.shown.indexOf(i), true) },
      el("span", { class: "marks" }, ...runs.map((_, r) => mark(r, i))), el("span", { class: "id" }, p.id), el("span", { class: "q" }, p.question.replace(/\s+/g, " "))));
  });
  list.replaceChildren(rows);
  $("count").textContent = view.shown.length === data.problems.length ? `${count(data.problems.length)} problems` : `${count(view.shown.length)} of ${count(data.problems.length)} problems`;
  const place = keep === undefined ? 0 : Math.max(view.shown.indexOf(keep), 0);
  view.at = -1;
  if (view.shown.length) open(place, false);
  else { trace.replaceChildren(el("p", { class: "empty" }, "No problem matches.")); list.removeAttribute("aria-activedescendant"); }
}

async function open(place, enter) {
  if (place < 0 || place >= view.shown.length) return;
  list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  view.at = place;
  const i = view.shown[place], row = document.getElementById(`o${i}`);
  row.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", row.id);
  const above = row.offsetTop - list.offsetTop, below = above + row.offsetHeight;
  if (above < list.scrollTop) list.scrollTop = above;
  else if (below > list.scrollTop + list.clientHeight) list.scrollTop = below - list.clientHeight;
  if (enter) { $("viewer").classList.add("open"); document.querySelector(".trace-pane").scrollTop = 0; }
  await show(i);
}

// Traces are kept compressed, in blocks; a block is unpacked when one of its problems is opened.
async function record(r, i) {
  if (!item(r, i)) return null;
  const key = `b${r}-${Math.floor(i / data.block)}`;
  if (!view.blocks.has(key)) {
    view.blocks.set(key, (async () => {
      const raw = Uint8Array.from(atob($(key).textContent.trim()), (c) => c.charCodeAt(0));
      const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
      return JSON.parse(await new Response(stream).text());
    })());
  }
  return (await view.blocks.get(key))[i % data.block];
}

async function show(i) {
  const p = data.problems[i], r = view.run, found = await record(r, i);
  if (view.shown[view.at] !== i || view.run !== r) return; // another one was opened meanwhile
  const head = el("div", {}, el("div", { class: "dim" }, p.kind ? `${p.id} · ${p.kind}` : p.id), el("div", { class: "question" }, p.question.trim()));
  if (p.choices.length) head.append(el("ul", { class: "choices" }, ...p.choices.map((c, n) => el("li", {}, `${String.fromCharCode(65 + n)}) ${c}`))));
  const tabs = el("div", { class: "tabs", role: "tablist", "aria-label": "Runs" }, ...runs.map((q, n) => el("button", { type: "button", class: "tab", role: "tab", "aria-selected": String(n === r), onclick: () => choose(n) }, mark(n, i), q.run)));
  trace.replaceChildren(head, el("div", { class: "facts" }, el("span", {}, "expected ", el("b", {}, p.answer))), tabs);
  if (tabs.scrollWidth > tabs.clientWidth) tabs.scrollLeft = tabs.children[r].offsetLeft - tabs.clientWidth / 2 + tabs.children[r].offsetWidth / 2;
  if (!found) { trace.append(el("p", { class: "empty" }, "This run has not finished this problem.")); return; }
  const score = item(r, i)[0];
  trace.append(el("div", { class: "facts" },
    el("span", { class: `verdict ${score >= 1 ? "right" : "wrong"}` }, score >= 1 ? "right" : score > 0 ? `score ${score}` : "wrong"),
    el("span", {}, "answer ", el("b", {}, found.answer === null ? "none" : found.answer.length > 80 ? found.answer.slice(0, 77) + "…" : found.answer || "empty")),
    el("span", {}, seconds(found.seconds)),
    el("span", {}, `${count(item(r, i)[1])} tokens`),
    found.finish === "stop" ? null : el("span", {}, found.finish === "length" ? "cut at the limit of tokens" : found.finish)));
  if (found.error) trace.append(el("p", { class: "error" }, found.error));
  if (found.steps.length) trace.append(...strip(found), el("ol", { class: "steps" }, ...found.steps.map((s, n) => stepRow(s, n, found.steps[n - 1]))));
  if (found.candidates.length) trace.append(candidates(found.candidates));
}

function strip(found) {
  const total = found.steps.reduce((t, s) => t + s.milliseconds, 0) || 1;
  const bar = el("div", { class: "strip" }, ...found.steps.map((s, n) => hover(el("button", { type: "button", tabindex: -1, class: isDropped(s) ? "re" : null, "aria-label": `step ${n + 1}`, style: `flex:${Math.max(s.milliseconds / total, 0.002)} 1 0;background-color:${slices.colour(s.slice)}`, onclick: () => { const row = trace.querySelector(`#s${n}`); row.scrollIntoView({ block: "nearest" }); row.classList.add("lit"); setTimeout(() => row.classList.remove("lit"), 900); } }), `step ${n + 1} by ${s.slice}, ${s.decision}\n${seconds(s.milliseconds / 1000)}`)));
  const shown = new Set(found.steps.flatMap((s) => [s.slice, s.drafter]));
  return [bar, el("div", { class: "strip-note" }, slices.legend(shown), el("span", {}, "time by step; hatched where a draft was dropped"))];
}

const isDropped = (s) => Boolean(s.retracted || s.retracted_ids?.length);
const written = (text, ids) => (text === null || text === undefined ? (ids || []).join(" ") : text);
const trim = (t) => t.replace(/\n+$/, "") || "⏎";

function stepRow(s, n, before) {
  const colours = `--c:${slices.colour(s.slice)};--ct:${slices.ink(s.slice)}`;
  const turn = (!before && s.phase) || (before && before.phase !== s.phase);
  const whole = written(s.text, s.token_ids);
  let body;
  if (isDropped(s)) {
    const cut = s.drafted_characters ?? (s.drafted_tokens ? (s.drafted_tokens >= s.tokens ? whole.length : 0) : 0);
    const kept = whole.slice(0, cut), fresh = whole.slice(cut);
    const shownKept = kept ? el("span", { class: "kept" }, kept) : null;
    body = el("div", { class: "swap" },
      el("div", { class: "dropped", style: `--c:${slices.colour(s.drafter)};--ct:${slices.ink(s.drafter)}` }, el("h5", {}, el("b", {}, s.drafter), " drafted"), el("div", { class: "text" }, shownKept?.cloneNode(true), el("s", {}, trim(written(s.retracted, s.retracted_ids))))),
      el("div", { class: "replaced" }, el("h5", {}, el("b", {}, s.slice), kept ? " wrote the rest" : " wrote"), el("div", { class: "text" }, shownKept, fresh ? el("mark", {}, trim(fresh)) : null)));
  } else body = el("div", { class: "text" }, trim(whole));
  const score = s.score === null || s.score === undefined ? null : el("span", { class: "score" }, s.score < 0.01 ? s.score.toExponential(0) : s.score.toFixed(2));
  const meta = el("div", { class: "meta" }, el("span", {}, score, score ? " " : "", el("span", { class: `decision ${s.decision}` }, s.decision)), el("span", {}, `${s.tokens} tok`), el("span", {}, seconds(s.milliseconds / 1000)));
  if (score) hover(score, `lowest probability of a drafted token: ${s.score.toPrecision(3)}${s.mean_score === null || s.mean_score === undefined ? "" : `\ngeometric mean: ${s.mean_score.toPrecision(3)}`}`);
  return el("li", { id: `s${n}`, style: colours, class: turn && before ? "part" : null }, turn ? el("div", { class: "part-name" }, s.phase === "thinking" ? "Thinking" : "Answer") : null, el("div", { class: "writer" }, s.slice), body, meta);
}

function candidates(found) {
  return el("div", { class: "candidates" }, el("h4", {}, `${found.length} drafts to choose from`),
    el("ol", {}, ...found.map((c) => el("li", {}, c.chosen ? el("b", {}, `${c.answer ?? "no answer"} ← chosen`) : c.answer ?? "no answer", c.score === null ? "" : `   score ${c.score.toPrecision(2)}`))));
}

function choose(r) {
  view.run = (r + runs.length) % runs.length;
  const i = view.shown[view.at];
  if (filter.value === "all" && sort.value === "number") show(i);
  else refresh(i, true);
}

let typing;
search.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => refresh(view.shown[view.at]), 80); });
for (const box of [filter, sort]) box.addEventListener("change", () => refresh());
$("back").addEventListener("click", () => { $("viewer").classList.remove("open"); list.focus(); });

document.addEventListener("keydown", (event) => {
  if (event.metaKey || event.ctrlKey || event.altKey) return;
  const inField = event.target.matches("input, select, textarea");
  if (event.key === "Escape") { if (inField) event.target.blur(); $("viewer").classList.remove("open"); return; }
  if (inField) { if (event.target === search && event.key === "Enter") { search.blur(); list.focus(); } return; }
  const inList = document.activeElement === list;
  const moves = {
    j: () => open(view.at + 1, true), k: () => open(view.at - 1, true),
    h: () => choose(view.run - 1), l: () => choose(view.run + 1),
    "/": () => search.focus(),
    f: () => { const keys = Object.keys(FILTERS); filter.value = keys[(keys.indexOf(filter.value) + 1) % keys.length]; refresh(); },
  };
  if (inList) Object.assign(moves, {
    ArrowDown: moves.j, ArrowUp: moves.k, ArrowLeft: moves.h, ArrowRight: moves.l,
    Home: () => open(0, true), End: () => open(view.shown.length - 1, true),
    PageDown: () => open(Math.min(view.at + 10, view.shown.length - 1), true), PageUp: () => open(Math.max(view.at - 10, 0), true),
    Enter: () => open(view.at, true),
  });
  if (!moves[event.key]) return;
  event.preventDefault();
  if ("jkhl".includes(event.key)) $("viewer").scrollIntoView({ block: "nearest" });
  moves[event.key]();
});

if (data.problems.length && runs.length) refresh();
else $("traces").hidden = true;
