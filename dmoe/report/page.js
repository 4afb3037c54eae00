"use strict";
// Draws what the page's data says. Text goes into the page as text alone: a layer or a token may be called anything.
const data = JSON.parse(document.getElementById("data").textContent);
const layers = data.layers, steps = data.steps, columns = steps.length;
const $ = (id) => document.getElementById(id);
const PARTS = [["router", "#56b4e9"], ["dispatch", "#e69f00"], ["experts", "#009e73"], ["combine", "#cc79a7"]];
const OTHER = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98"];
const last = (curve) => { for (let i = curve.length; i--;) if (curve[i] !== null) return curve[i]; return null; };
// The most uneven layer at the end is what one wants to see first.
let chosen = layers.reduce((best, layer, i) => (last(layer.peak) ?? 0) > (last(layers[best].peak) ?? 0) ? i : best, 0);
// Long names differ behind what they all begin with.
const start = layers.length < 2 ? "" : layers.reduce((common, { name }) => {
  while (!name.startsWith(common)) common = common.slice(0, -1);
  return common;
}, layers[0].name).replace(/[^.]*$/, "");
const brief = (name) => name.length > 16 && start ? `…${name.slice(start.length)}` : name;

function make(kind, text, parent, attributes = {}) {
  const element = document.createElement(kind);
  if (text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.append(element);
  return element;
}
function draw(kind, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}
const stepName = (column) => {
  const [first, last] = steps[column];
  return first === last ? `step ${first}` : `steps ${first} to ${last}`;
};
const digits = (value) => value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
  : String(Number(value.toPrecision(3)));
const percent = (value) => `${Number((100 * value).toPrecision(3))}%`;
const duration = (value) => value === 0 ? "0" : value >= 1 ? `${digits(value)} s` : value >= 1e-3 ? `${digits(value * 1e3)} ms` : `${digits(value * 1e6)} µs`;
const size = (value) => {
  if (value === 0) return "0";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit++; }
  return `${digits(value)} ${units[unit]}`;
};

// ------------------------------------------------------------------------------------------------------------ tooltip
function tell(text, x, y) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
}
const hush = () => { $("tip").hidden = true; };
addEventListener("scroll", hush, { passive: true });

// ---------------------------------------------------------------------------------------------------------- heat maps
const bytes = layers.map((layer) => Uint8Array.from(atob(layer.load), (c) => c.charCodeAt(0)));
function colours() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  const stops = ["--cold", "--cool", "--even", "--warm", "--hot"].map(rgb);
  const table = [rgb("--dead")];
  for (let i = 0; i < 253; i++) {
    const place = i / 252 * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    table.push(stops[low].map((value, c) => Math.round(value + (stops[low + 1][c] - value) * (place - low))));
  }
  table[255] = rgb("--none");
  return table;
}
function paint(canvas, layer, table) {
  canvas.width = columns;
  canvas.height = layers[layer].experts;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, layers[layer].experts);
  bytes[layer].forEach((value, i) => image.data.set([...table[value], 255], 4 * i));
  context.putImageData(image, 0, 0);
}
function loadWords(layer, expert, column) {
  const value = bytes[layer][expert * columns + column], experts = layers[layer].experts;
  if (value === 255) return "the layer did not run";
  if (value === 0) return "no token";
  const times = 2 ** ((value - 1) / 252 * 6 - 3);
  const beyond = value === 1 ? "at most " : value === 253 ? "at least " : "";
  const two = (number) => Number(number.toPrecision(2)); // a byte knows no more
  return `${beyond}${two(times)} times an even load (${two(100 * times / experts)}% of the assignments)`;
}

function maps() {
  const legend = $("legend");
  const scale = make("div", null, legend, { class: "scale" });
  make("i", null, scale);
  const marks = make("span", null, scale);
  for (const mark of ["⅛", "¼", "½", "even", "2×", "4×", "8×"]) make("span", mark, marks);
  make("span", "no token", legend, { class: "swatch", style: "--swatch: var(--dead)" });
  make("span", "did not run", legend, { class: "swatch", style: "--swatch: var(--none)" });
  if (layers.length < 2) return;
  if (layers.length > 20) $("maps").className = "many";
  layers.forEach((layer, i) => {
    const peak = last(layer.peak);
    const words = peak === null ? "" : `${peak.toFixed(1)}×`;
    const button = make("button", null, $("maps"), { "aria-label": `layer ${layer.name}, busiest expert ${words}`, "aria-pressed": "false" });
    make("canvas", null, button, { "data-layer": i });
    const line = make("span", null, button);
    make("b", brief(layer.name), line, { title: layer.name });
    make("em", words, line);
    button.addEventListener("click", () => { choose(i); $("detail").scrollIntoView({ block: "nearest", behavior: "smooth" }); });
  });
}

let cursor = [0, 0];
function big() {
  const layer = layers[chosen], box = $("big");
  box.replaceChildren();
  const height = Math.max(120, Math.min(520, layer.experts * (layer.experts > 24 ? 8 : 15)));
  const axis = make("div", null, box, { class: "y" });
  const every = Math.max(1, Math.ceil(layer.experts * 15 / height));
  for (let e = 0; e < layer.experts; e += every)
    make("span", e ? e : "expert 0", axis, { style: `top: ${(e + 0.5) / layer.experts * 100}%` });
  const canvas = make("canvas", null, box, {
    tabindex: 0, role: "img", style: `height: ${height}px`,
    "aria-label": `Load of the ${layer.experts} experts of ${layer.name} over ${columns} columns of steps; arrow keys read it`,
  });
  const below = make("div", null, box, { class: "x" });
  make("span", `step ${steps[0][0]}`, below);
  if (columns > 2) make("span", steps[columns >> 1][0], below);
  make("span", steps[columns - 1][1], below);
  paint(canvas, chosen, colours());
  const words = (e, c) => `${stepName(c)}, expert ${e}: ${loadWords(chosen, e, c)}`;
  const at = (event) => {
    const area = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - area.left) / area.width * columns);
    const e = Math.floor((event.clientY - area.top) / area.height * layer.experts);
    return [Math.max(0, Math.min(e, layer.experts - 1)), Math.max(0, Math.min(c, columns - 1))];
  };
  canvas.addEventListener("pointermove", (event) => { cursor = at(event); tell(words(...cursor), event.clientX, event.clientY); });
  canvas.addEventListener("pointerleave", hush);
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    cursor = [Math.max(0, Math.min(cursor[0] + move[0], layer.experts - 1)), Math.max(0, Math.min(cursor[1] + move[1], columns - 1))];
    $("readout").textContent = words(...cursor);
  });
  const now = [...Array(layer.experts).keys()].map((e) => [bytes[chosen][e * columns + columns - 1], e])
    .filter(([value]) => value !== 255).sort((a, b) => b[0] - a[0]);
  $("readout").textContent = now.length < 2 ? "" :
    `At the end the busiest is expert ${now[0][1]}, at ${loadWords(chosen, now[0][1], columns - 1)}; ` +
    `the idlest expert ${now[now.length - 1][1]}: ${loadWords(chosen, now[now.length - 1][1], columns - 1)}.`;
}

// ------------------------------------------------------------------------------------------------------------- curves
function depth(i) {
  const stops = [[94, 201, 98], [33, 145, 140], [59, 82, 139], [128, 60, 160]];
  const place = (layers.length < 2 ? 0 : i / (layers.length - 1)) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return `rgb(${stops[low].map((value, c) => Math.round(value + (stops[low + 1][c] - value) * (place - low))).join(" ")})`;
}
function ticks(low, high, unit, whole) {
  if (unit > 1) return ticks(low / unit, high / unit, 1).map((tick) => tick * unit);
  const raw = Math.max((high - low) / 5, whole ? 1 : 0), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step / 1e6 ? 0 : value);
  return found;
}
// One chart: series are {name, colour, values, strong}; stacked ones are areas, one upon the other.
function chart(parent, { title, unit, series, show, floor = 0, ceiling = null, power = 0, whole = false, stacked = false, words = "", wide = false }) {
  series = series.filter((each) => each.values.some((value) => value !== null));
  if (!series.length) return;
  const figure = make("figure", null, parent, { class: wide ? "chart wide" : "chart" });
  const caption = make("figcaption", title, figure);
  make("em", unit, caption);
  const W = wide ? 1040 : 400, H = 190, L = 52, R = 8, T = 10, B = 22;
  const tops = stacked ? steps.map((_, c) => series.reduce((sum, each) => sum + (each.values[c] ?? 0), 0))
    : series.flatMap((each) => each.values.filter((value) => value !== null));
  let low = Math.min(floor ?? Infinity, ...(stacked ? [0] : [tops.reduce((a, b) => Math.min(a, b))])), high = ceiling ?? tops.reduce((a, b) => Math.max(a, b));
  if (high - low < 1e-12) high = low + (Math.abs(low) || 1);
  const X = (c) => L + (columns < 2 ? 0.5 : c / (columns - 1)) * (W - L - R), Y = (value) => H - B - (value - low) / (high - low) * (H - B - T);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}, ${unit}. ${words}` }, figure);
  for (const tick of ticks(low, high, power ? power ** Math.floor(Math.log(Math.max(high, 1)) / Math.log(power)) : 1, whole)) {
    draw("line", { x1: L, x2: W - R, y1: Y(tick), y2: Y(tick), stroke: "var(--grid)" }, svg);
    draw("text", { x: L - 6, y: Y(tick) + 4, "text-anchor": "end" }, svg).textContent = show(tick);
  }
  draw("text", { x: L, y: H - 6 }, svg).textContent = `step ${steps[0][0]}`;
  if (columns > 1) draw("text", { x: W - R, y: H - 6, "text-anchor": "end" }, svg).textContent = steps[columns - 1][1];
  const below = new Array(columns).fill(0);
  for (const each of series) {
    if (stacked) {
      const up = [], down = [];
      for (let c = 0; c < columns; c++) {
        down.push(`${X(c).toFixed(1)},${Y(below[c]).toFixed(1)}`);
        below[c] += each.values[c] ?? 0;
        up.push(`${X(c).toFixed(1)},${Y(below[c]).toFixed(1)}`);
      }
      draw("polygon", { points: [...up, ...down.reverse()].join(" "), fill: each.colour, "fill-opacity": 0.85 }, svg);
      continue;
    }
    let path = "", pen = false;
    const alone = each.values.filter((value) => value !== null).length < columns / 2; // measured seldom: joined all the same
    each.values.forEach((value, c) => {
      if (value === null) { pen = pen && alone; return; }
      path += `${pen ? "L" : "M"}${X(c).toFixed(1)} ${Y(value).toFixed(1)}`;
      pen = true;
    });
    draw("path", {
      d: path, fill: "none", stroke: each.colour, "stroke-linejoin": "round", "stroke-linecap": "round",
      "stroke-width": each.strong ? 2.6 : series.length > 1 ? 1.1 : 1.8, "stroke-opacity": each.strong || series.length < 2 ? 1 : 0.45,
    }, svg);
    if (each.values.filter((value) => value !== null).length === 1) {
      const c = each.values.findIndex((value) => value !== null);
      draw("circle", { cx: X(c), cy: Y(each.values[c]), r: 3, fill: each.colour }, svg);
    }
  }
  if (stacked) {
    const key = make("div", null, figure, { class: "key" });
    for (const each of series) make("span", each.name, key, { class: "swatch", style: `--swatch: ${each.colour}` });
  }
  const hair = draw("line", { y1: T, y2: H - B, stroke: "var(--soft)", "stroke-dasharray": "3 3", visibility: "hidden" }, svg);
  svg.addEventListener("pointermove", (event) => {
    const spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const c = columns < 2 ? 0 : Math.max(0, Math.min(columns - 1, Math.round((spot.x - L) / (W - L - R) * (columns - 1))));
    hair.setAttribute("x1", X(c)); hair.setAttribute("x2", X(c)); hair.setAttribute("visibility", "visible");
    const there = series.filter((each) => each.values[c] !== null && each.values[c] !== undefined);
    let lines = there.map((each) => `${each.name}: ${show(each.values[c])}`);
    if (there.length > 5 && !stacked) {
      const order = [...there].sort((a, b) => b.values[c] - a.values[c]);
      const named = new Set([order[0], order[order.length - 1], ...there.filter((each) => each.strong)]);
      lines = order.filter((each) => named.has(each)).map((each) => `${each.name}: ${show(each.values[c])}`);
      lines.push(`and ${there.length - named.size} layers between`);
    }
    tell([stepName(c), ...(lines.length ? lines : ["not measured"])].join("\n"), event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", () => { hair.setAttribute("visibility", "hidden"); hush(); });
}

const CURVES = [
  ["peak", "Busiest expert", "× an even load", digits, { floor: 0 }],
  ["entropy", "Router entropy", "share of ln E", percent, { floor: 0, ceiling: 1 }],
  ["dead_experts", "Experts without a token", "of a step", digits, { floor: 0, whole: true }],
  ["dropped_share", "Dropped assignments", "share", percent, { floor: 0 }],
  ["router_logits_rms", "Router logits, RMS", "logits", digits, { floor: 0 }],
  ["router_logits_max", "Router logits, largest", "magnitude", digits, { floor: 0 }],
  ["expert_similarity", "Similarity of experts", "mean cosine", digits, { floor: null }],
  ["bytes_sent", "Sent between ranks", "a step", size, { floor: 0, power: 1024 }],
];
function curves() {
  const box = $("curves");
  box.replaceChildren();
  $("curvewords").textContent = layers.length < 2 ? "" :
    `A line for each layer, from green (first) to purple (last); ${layers[chosen].name} is drawn bold.`;
  const order = layers.map((_, i) => i).sort((a, b) => (a === chosen) - (b === chosen));
  for (const [name, title, unit, show, options] of CURVES) {
    if (name === "dropped_share" && layers.every((layer) => layer[name].every((value) => !value))) continue;
    const series = order.map((i) => ({ name: layers[i].name, colour: i === chosen && layers.length > 1 ? "var(--accent)" : depth(i), values: layers[i][name], strong: i === chosen }));
    const end = last(layers[chosen][name]);
    chart(box, { title, unit, series, show, ...options, words: end === null ? "" : `${layers[chosen].name} ends at ${show(end)}` });
  }
}
function times() {
  const box = $("timecharts");
  box.replaceChildren();
  const sums = PARTS.map(([part, colour]) => ({
    name: part, colour,
    values: steps.map((_, c) => layers.reduce((sum, layer) => layer.seconds[part]?.[c] == null ? sum : (sum ?? 0) + layer.seconds[part][c], null)),
  }));
  const words = "stacked areas over the steps";
  chart(box, { title: "Parts of the mixtures' forwards, all layers", unit: "a step", series: sums, show: duration, stacked: true, words });
  const named = Object.entries(data.parts).map(([name, values], i) => ({ name, colour: OTHER[i % OTHER.length], values }));
  const rest = { name: "the rest", colour: "#8a8f98", values: data.seconds.map((all, c) => all === null ? null : Math.max(0, all - named.reduce((sum, each) => sum + (each.values[c] ?? 0), 0))) };
  if (named.length) chart(box, { title: "Parts of a step", unit: "a step", series: [...named, rest], show: duration, stacked: true, words });
  else chart(box, { title: "A step", unit: "seconds", series: [{ name: "step", colour: OTHER[0], values: data.seconds }], show: duration });
  const speed = data.seconds.map((all, c) => all ? data.tokens[c] / all : null);
  chart(box, { title: "Tokens", unit: "a second", series: [{ name: "tokens a second", colour: OTHER[0], values: speed }], show: digits });
  if (!box.children.length) $("times").hidden = true;
}
function prefers() {
  const box = $("prefers"), layer = layers[chosen];
  box.replaceChildren();
  if (!layers.some((each) => each.prefers)) { $("tokens").hidden = true; return; }
  if (!layer.prefers) { make("p", `Of ${layer.name} no tokens were counted.`, box, { class: "note" }); return; }
  layer.prefers.forEach((tokens, expert) => {
    const row = make("div", null, box, { class: "expert" });
    make("b", `expert ${expert}`, row);
    const chips = make("div", null, row, { class: "chips" });
    for (const [name, factor, count] of tokens) {
      const strength = Math.min(70, 12 + 58 * Math.log2(factor) / Math.log2(Math.max(2, layer.experts)));
      const chip = make("span", null, chips, { class: "chip", style: `--strength: ${strength.toFixed(0)}`, title: `${count.toLocaleString("en")} assignments` });
      make("code", name.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "·"), chip);
      make("i", `${factor.toFixed(1)}×`, chip);
    }
    if (!tokens.length) make("span", "no preference", chips, { class: "note" });
  });
}

// ---------------------------------------------------------------------------------------------------------------- all
function choose(i) {
  chosen = (i + layers.length) % layers.length;
  cursor = [0, 0];
  if ($("layer")) $("layer").value = chosen;
  $("chosen").textContent = layers[chosen].name;
  document.querySelectorAll("#maps button").forEach((button, place) => button.setAttribute("aria-pressed", place === chosen));
  big();
  curves();
  prefers();
}
function theme() {
  const table = colours();
  document.querySelectorAll("#maps canvas").forEach((canvas) => paint(canvas, Number(canvas.dataset.layer), table));
  if (layers.length) big();
}
if (layers.length) {
  maps();
  if (layers.length < 2) document.querySelector(".picker > div").remove();
  else layers.forEach((layer, i) => make("option", layer.name, $("layer"), { value: i }));
  $("layer")?.addEventListener("change", (event) => choose(Number(event.target.value)));
  $("before")?.addEventListener("click", () => choose(chosen - 1));
  $("after")?.addEventListener("click", () => choose(chosen + 1));
  choose(chosen);
  theme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
} else {
  for (const id of ["loads", "detail", "tokens"]) $(id).hidden = true;
}
times();
