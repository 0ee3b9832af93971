"use strict";
// Behaviour of the report's page: theme, contents, tables that sort, and the explorer. All numbers are read from the
// page; nothing is computed here but places on the screen.

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "g", "path", "line", "rect", "circle", "polyline", "text"]);
const byId = (id) => document.getElementById(id);

/** An element with attributes (`--name` sets a CSS variable) and children. */
function node(tag, attributes = {}, ...children) {
  const element = DRAWN.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const isNumber = (value) => value !== null && value !== undefined;

/** Decimals that show two digits of a half-width. */
const decimals = (half) => (half > 0 ? Math.min(Math.max(1 - Math.floor(Math.log10(half)), 0), 6) : 2);

/** A number with that many decimals and a proper minus; a dash where there is none. */
function fixed(value, places, sign = true) {
  if (!isNumber(value)) return "–";
  const text = Math.abs(value).toFixed(places);
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : sign ? "+" : "") + text;
}

function estimate([mean, low, high]) {
  if (!isNumber(mean)) return "no data";
  if (!isNumber(low)) return `${fixed(mean, 2)} (no interval)`;
  const places = decimals((high - low) / 2);
  return `${fixed(mean, places)} [${fixed(low, places)},\u00a0${fixed(high, places)}]`;
}

const thousands = (value) => (value >= 1000 ? Math.round(value).toLocaleString("en").replaceAll(",", "\u202f") : String(Number(value.toPrecision(3))));

// ---------------------------------------------------------------------------------------------------------------
// The document: theme, contents, tables

function themes() {
  const root = document.documentElement, button = byId("theme");
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const show = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

function contents() {
  const links = new Map([...document.querySelectorAll("#contents a")].map((a) => [a.hash.slice(1), a]));
  const headings = [...links.keys()].map(byId).filter(Boolean);
  const mark = () => {
    const passed = headings.filter((heading) => heading.getBoundingClientRect().top < 120);
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get((passed.at(-1) ?? headings[0])?.id)?.setAttribute("aria-current", "true");
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
}

/** Boxes that need no scrolling need no place in the order of Tab. */
function scrollBoxes() {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.clientWidth === 0) continue; // folded away: not measured yet
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

function sortValue(cell) {
  const text = cell.textContent.trim().replaceAll("−", "-").replaceAll("\u202f", "");
  const number = text.match(/^[<+]?(-?\d+(\.\d+)?)/);
  return number ? Number(number[1]) : text;
}

function sortable(table) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 3) return;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = node("button", { type: "button", class: "sort" }, ...head.childNodes);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [sortValue(row.cells[column]), row]);
      const compare = ([a], [b]) => (typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : typeof a === "number" ? a - b : a.localeCompare(b, "en"));
      rows.sort((a, b) => (down ? -compare(a, b) : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
    head.append(button);
  });
}

function paper() {
  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
}

// ---------------------------------------------------------------------------------------------------------------
// Drawing

const DASHES = { "-": null, "--": "7 4", ":": "2 4", "-.": "7 3 2 3" };

/** Outline of a marker around (0, 0), the same shapes as in the figures. */
function outline(marker, r) {
  const polygon = (points) => `M${points.map(([x, y]) => `${(x * r).toFixed(2)},${(y * r).toFixed(2)}`).join("L")}Z`;
  const star = Array.from({ length: 10 }, (_, i) => [(i % 2 ? 0.5 : 1.25) * Math.sin((i * Math.PI) / 5), (i % 2 ? -0.5 : -1.25) * Math.cos((i * Math.PI) / 5)]);
  const plus = [[-0.35, -1.1], [0.35, -1.1], [0.35, -0.35], [1.1, -0.35], [1.1, 0.35], [0.35, 0.35], [0.35, 1.1], [-0.35, 1.1], [-0.35, 0.35], [-1.1, 0.35], [-1.1, -0.35], [-0.35, -0.35]];
  const shapes = {
    s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
    "^": [[0, -1.1], [1.05, 0.85], [-1.05, 0.85]],
    v: [[0, 1.1], [1.05, -0.85], [-1.05, -0.85]],
    D: [[0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]],
    P: plus,
    X: plus.map(([x, y]) => [(x - y) * 0.75, (x + y) * 0.75]),
    "*": star,
  };
  return shapes[marker] ? polygon(shapes[marker]) : `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
}

const linear = ([a, b], [c, d]) => (value) => c + ((value - a) / (b - a || 1)) * (d - c);

/** A range that holds all values and 0, with a margin. */
function extent(values) {
  const kept = values.filter(isNumber);
  let low = Math.min(0, ...kept), high = Math.max(0, ...kept);
  if (low === high) [low, high] = [-1, 1];
  const margin = (high - low) * 0.06;
  return [low - margin, high + margin];
}

function ticks([low, high], wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (String(step / power).startsWith("2.5") ? 1 : 0));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push([i * step, fixed(i * step, places, false)]);
  return found;
}

/** Places on a logarithmic axis: the points themselves where they are few, else 1, 2 and 5 times powers of ten. */
function logTicks(seen) {
  const distinct = [...new Set(seen)].sort((a, b) => a - b);
  if (distinct.length <= 5) return distinct;
  const found = [];
  for (let power = Math.floor(Math.log10(distinct[0])); power <= Math.log10(distinct.at(-1)); power += 1)
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  const inside = found.filter((value) => value >= distinct[0] * 0.9 && value <= distinct.at(-1) * 1.1);
  return inside.length > 5 ? inside.filter((_, i) => i % Math.ceil(inside.length / 5) === 0) : inside;
}

const line = (name, x1, y1, x2, y2) => node("line", { class: name, x1, y1, x2, y2 });
const label = (x, y, text, anchor = "middle", name = "tick") => node("text", { x, y, "text-anchor": anchor, class: name }, text);
const shortened = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// ---------------------------------------------------------------------------------------------------------------
// The explorer

function explore(data) {
  const charts = byId("charts"), detail = byId("detail"), status = byId("status"), tip = byId("tip");
  const own = (t) => data.trained[t];
  const state = {
    view: "gains",
    arms: new Set(data.arms.keys()),
    trained: new Set([0]),
    rewards: new Set([own(0), ...data.witnesses[0]]),
    axis: 0,
    chosen: null, // what the pictures are of: {t, a, i} = training reward, arm, seed
    step: 0,
    filter: "",
    page: 0,
  };
  const VIEWS = { gains: "Gains", curves: "Learning curves", price: "Trade-offs", matrix: "Matrix" };

  const chosen = (set) => [...set].sort((a, b) => a - b);
  const rewardsFor = (t) => [own(t), ...chosen(state.rewards).filter((e) => e !== own(t))];
  const panels = () => chosen(state.trained).flatMap((t) => rewardsFor(t).map((e) => [t, e]));
  const role = (t, e) => (e === own(t) ? data.relation : `${data.rewards[e].role}, ${data.relation} ${data.rewards[own(t)].name}`);

  // ---- controls

  function swatch(arm) {
    return node("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true", class: "swatch", "--c": arm.colour },
      node("path", { d: outline(arm.marker, 5.5), class: "mark" }));
  }

  function choices(title, items, set, redraw) {
    const boxes = items.map(({ text, extra, value }) => {
      const input = node("input", { type: "checkbox", checked: set.has(value) });
      input.addEventListener("change", () => { if (input.checked) set.add(value); else set.delete(value); redraw(); });
      return node("label", { class: "choice" }, input, extra ?? null, node("bdi", {}, text));
    });
    const every = node("button", { type: "button", class: "quiet" }, "all or none");
    every.addEventListener("click", () => {
      const none = set.size === items.length;
      set.clear();
      if (!none) for (const { value } of items) set.add(value);
      for (const [i, box] of boxes.entries()) box.firstChild.checked = set.has(items[i].value);
      redraw();
    });
    return node("fieldset", {}, node("legend", {}, title), ...boxes, items.length > 4 ? every : null);
  }

  function controls() {
    const form = byId("controls");
    form.addEventListener("submit", (event) => event.preventDefault());
    const views = Object.entries(VIEWS).map(([value, text]) => {
      const input = node("input", { type: "radio", name: "view", value, checked: value === state.view });
      input.addEventListener("change", () => { state.view = value; draw(); });
      return node("label", {}, input, node("span", {}, text));
    });
    const axis = node("select", { id: "axis" }, ...data.axes.map(([, text], i) => node("option", { value: i }, text)));
    axis.addEventListener("change", () => { state.axis = Number(axis.value); draw(); });
    form.append(
      node("fieldset", { class: "views" }, node("legend", {}, "View"), ...views),
      choices("Methods", data.arms.map((arm, value) => ({ text: arm.label, extra: swatch(arm), value })), state.arms, draw),
      ...(data.trained.length > 1
        ? [choices(data.relation[0].toUpperCase() + data.relation.slice(1), data.trained.map((e, value) => ({ text: data.rewards[e].name, value })), state.trained, draw)]
        : []),
      choices("Scored by", data.rewards.map((reward, value) => ({ text: reward.name, value })), state.rewards, draw),
      node("div", { class: "axis", id: "axis-box" }, node("label", { for: "axis" }, "Budget axis"), axis),
    );
  }

  // ---- points

  function hint(text, target) {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = target.getBoundingClientRect();
    const left = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, 6), innerWidth - tip.offsetWidth - 6);
    tip.style.left = `${left}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
  }

  /** A seed's value: seen, pointed at, walked to and opened. `spent` is a place on the first budget axis, or null. */
  function point(x, y, { t, a, i, spent = null }, text, { r = 5, hollow = false } = {}) {
    const arm = data.arms[a];
    const open = () => select({ t, a, i }, spent, true);
    return node("g", {
      class: hollow ? "point hollow" : "point", role: "button", tabindex: -1, "aria-label": text,
      transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, "--c": arm.colour, "data-key": `${t}/${a}/${i}`, "data-spent": spent,
      onclick: open,
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } },
      onfocus: (event) => hint(text, event.currentTarget),
      onmouseenter: (event) => hint(text, event.currentTarget),
      onblur: () => hint(""), onmouseleave: () => hint(""),
    }, node("circle", { r: r + 6, class: "hit" }), node("circle", { r: r + 4, class: "ring" }),
    node("path", { d: outline(arm.marker, r), class: "mark" }));
  }

  /** One stop of Tab for all points of a chart; arrow keys walk between them. */
  function walkable(svg) {
    const points = [...svg.querySelectorAll(".point")];
    points[0]?.setAttribute("tabindex", 0);
    svg.addEventListener("keydown", (event) => {
      const at = points.indexOf(document.activeElement);
      const moves = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: points.length - 1 };
      if (at < 0 || !(event.key in moves)) return;
      event.preventDefault();
      const next = points[Math.min(Math.max(moves[event.key], 0), points.length - 1)];
      points[at].setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
    return svg;
  }

  /** A box with a heading; drawn once all boxes have their places, and so their widths. */
  let waiting = [];
  function panel(title, about, paint) {
    const box = node("figure", { class: "panel" }, node("figcaption", {}, node("strong", {}, node("bdi", {}, title)), node("span", {}, about)));
    charts.append(box);
    waiting.push(() => {
      const width = Math.max(Math.floor(box.clientWidth), 240);
      return () => box.append(walkable(paint(width)));
    });
  }

  const frame = (width, height, text) => node("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": text });

  // ---- views

  /** Intervals with every seed as a dot. */
  function drawGains([t, e]) {
    const reward = data.rewards[e], arms = chosen(state.arms), unit = reward.unit;
    panel(reward.name, `${role(t, e)}; gain (${unit}) →`, (width) => {
      const longest = Math.max(...arms.map((a) => data.arms[a].label.length), 3);
      const left = Math.min(14 + 7.6 * longest, width * 0.36), right = width - 12, row = 42, top = 8;
      const bottom = top + row * arms.length, found = arms.map((a) => data.gains[t][a][e]);
      const range = extent(found.flatMap((gain) => (gain ? [...gain.values, ...gain.interval] : [])));
      const x = linear(range, [left, right]);
      const svg = frame(width, bottom + 26, `Gain on ${reward.name}, one row for each method`);
      for (const [value, text] of ticks(range, width < 340 ? 3 : 5)) svg.append(line("grid", x(value), top, x(value), bottom), label(x(value), bottom + 16, text));
      svg.append(line("zero", x(0), top, x(0), bottom));
      for (const [place, a] of arms.entries()) {
        const gain = found[place], arm = data.arms[a], y = top + row * (place + 0.5);
        const name = label(left - 8, y + 4, shortened(arm.label, Math.floor((left - 8) / 7)), "end", "name");
        svg.append(name);
        if (!gain) { svg.append(label((left + right) / 2, y + 4, "no data")); continue; }
        const [mean, low, high] = gain.interval;
        if (isNumber(low)) svg.append(node("rect", { class: "interval", x: x(low), y: y - 10, width: Math.max(x(high) - x(low), 1), height: 20, rx: 3, "--c": arm.colour }));
        svg.append(line("mean", x(mean), y - 14, x(mean), y + 14));
        const order = gain.values.map((value, i) => [value, i]).filter(([value]) => isNumber(value)).sort(([v], [w]) => v - w);
        for (const [rank, [value, i]] of order.entries()) {
          const shift = order.length > 1 ? ((rank % 3) - 1) * 6 : 0;
          const text = `${arm.label}, seed ${gain.seeds[i]}: gain ${fixed(value, decimals((high - low) / 2))} ${unit} on ${reward.name}${gain.diverged.includes(i) ? " (diverged)" : ""}`;
          svg.append(point(x(value), y + shift, { t, a, i }, text, { hollow: gain.diverged.includes(i) }));
        }
        svg.append(label(x(mean), y - 15, fixed(mean, decimals((high - low) / 2)), "middle", "value"));
      }
      return svg;
    });
  }

  /** Seeds, mean and pointwise band against what was spent. */
  function drawCurves([t, e]) {
    const reward = data.rewards[e];
    const arms = chosen(state.arms).filter((a) => data.curves[t][a]?.by_reward[e]);
    if (!arms.length) return;
    const [, axisText] = data.axes[state.axis];
    panel(reward.name, `${role(t, e)}; gain (${reward.unit}) ↑`, (width) => {
      const left = 46, right = width - 14, top = 8, bottom = Math.min(Math.max(width * 0.62, 190), 300);
      const curves = arms.map((a) => ({ a, all: data.curves[t][a], drawn: data.curves[t][a].by_reward[e] }));
      const spent = curves.flatMap(({ all }) => all.spent[state.axis].flat()).filter((value) => value > 0);
      const range = extent(curves.flatMap(({ drawn }) => [...drawn.values.flat(), ...drawn.bands.flat()]));
      const svg = frame(width, bottom + 40, `Gain on ${reward.name} against ${axisText}`);
      if (!spent.length) { svg.append(label(width / 2, 60, "not recorded")); return svg; }
      const place = linear([Math.log(Math.min(...spent)), Math.log(Math.max(...spent))], [left + 10, right - 6]);
      const x = (value) => place(Math.log(value)), y = linear(range, [bottom, top]);
      for (const [value, text] of ticks(range, 5)) svg.append(line("grid", left, y(value), right, y(value)), label(left - 6, y(value) + 4, text, "end"));
      for (const value of logTicks(curves.flatMap(({ all }) => all.mean_spent[state.axis].filter((v) => v > 0)))) svg.append(line("grid", x(value), top, x(value), bottom), label(x(value), bottom + 16, thousands(value)));
      svg.append(line("zero", left, y(0), right, y(0)), label((left + right) / 2, bottom + 34, axisText, "middle", "axis-title"));
      const marks = [];
      for (const { a, all, drawn } of curves) {
        const arm = data.arms[a], look = { "--c": arm.colour }, middle = all.mean_spent[state.axis];
        const known = middle.map((value, j) => j).filter((j) => middle[j] > 0 && isNumber(drawn.bands[j][0]));
        const banded = known.filter((j) => isNumber(drawn.bands[j][1]));
        const corners = [...banded.map((j) => [middle[j], drawn.bands[j][1]]), ...banded.toReversed().map((j) => [middle[j], drawn.bands[j][2]])];
        if (banded.length > 1) svg.append(node("path", { class: arms.length > 4 ? "band faint" : "band", ...look, d: `M${corners.map(([u, v]) => `${x(u)},${y(v)}`).join("L")}Z` }));
        for (const [i, seed] of all.seeds.entries()) {
          const here = all.spent[state.axis][i], values = drawn.values[i];
          const seen = values.map((value, j) => j).filter((j) => here[j] > 0 && isNumber(values[j]));
          svg.append(node("polyline", { class: "seed", ...look, points: seen.map((j) => `${x(here[j])},${y(values[j])}`).join(" ") }));
          for (const j of seen) {
            const text = `${arm.label}, seed ${seed}, ${thousands(here[j])} ${data.axes[state.axis][0].replaceAll("_", " ")}: gain ${fixed(values[j], 3)} ${reward.unit} on ${reward.name}`;
            marks.push(point(x(here[j]), y(values[j]), { t, a, i: index(t, a, seed), spent: all.spent[0][i][j] }, text, { r: 3 }));
          }
        }
        svg.append(node("polyline", { class: "curve", ...look, "stroke-dasharray": DASHES[arm.line], points: known.map((j) => `${x(middle[j])},${y(drawn.bands[j][0])}`).join(" ") }));
      }
      svg.append(...marks);
      return svg;
    });
  }

  /** Place of a seed among the planned seeds of an arm. */
  const index = (t, a, seed) => data.gains[t][a][own(t)]?.seeds.indexOf(seed) ?? 0;

  /** What the gain on the training reward does to another measure, both in base SD. */
  function drawPrice([t, e]) {
    if (e === own(t)) return;
    const proxy = data.rewards[own(t)], other = data.rewards[e];
    panel(other.name, `${role(t, e)}; gain (base SD) ↑`, (width) => {
      const left = 46, right = width - 12, top = 8, bottom = Math.min(Math.max(width * 0.72, 200), 320);
      const pairs = chosen(state.arms).map((a) => [a, data.gains[t][a][own(t)], data.gains[t][a][e]]).filter(([, u, v]) => u && v);
      const xRange = extent(pairs.flatMap(([, gain]) => [...gain.standardised, ...gain.standardised_interval]));
      const yRange = extent(pairs.flatMap(([, , gain]) => [...gain.standardised, ...gain.standardised_interval]));
      const x = linear(xRange, [left, right]), y = linear(yRange, [bottom, top]);
      const svg = frame(width, bottom + 40, `Gain on ${other.name} against gain on ${proxy.name}`);
      for (const [value, text] of ticks(xRange, 5)) svg.append(line("grid", x(value), top, x(value), bottom), label(x(value), bottom + 16, text));
      for (const [value, text] of ticks(yRange, 5)) svg.append(line("grid", left, y(value), right, y(value)), label(left - 6, y(value) + 4, text, "end"));
      const low = Math.max(xRange[0], yRange[0]), high = Math.min(xRange[1], yRange[1]);
      svg.append(line("diagonal", x(low), y(low), x(high), y(high)), line("zero", left, y(0), right, y(0)), line("zero", x(0), top, x(0), bottom));
      svg.append(label((left + right) / 2, bottom + 34, `gain on ${proxy.name} (base SD) →`, "middle", "axis-title"));
      for (const [a, u, v] of pairs) {
        const [cx, cy] = [u.standardised_interval, v.standardised_interval], look = { "--c": data.arms[a].colour };
        if (isNumber(cx[1]) && isNumber(cy[1])) svg.append(
          node("line", { class: "cross", ...look, x1: x(cx[1]), x2: x(cx[2]), y1: y(cy[0]), y2: y(cy[0]) }),
          node("line", { class: "cross", ...look, x1: x(cx[0]), x2: x(cx[0]), y1: y(cy[1]), y2: y(cy[2]) }));
        for (const [i, value] of u.standardised.entries()) {
          if (!isNumber(value) || !isNumber(v.standardised[i])) continue;
          const text = `${data.arms[a].label}, seed ${u.seeds[i]}: ${fixed(value, 2)} base SD on ${proxy.name}, ${fixed(v.standardised[i], 2)} on ${other.name}`;
          svg.append(point(x(value), y(v.standardised[i]), { t, a, i }, text, { hollow: u.diverged.includes(i) }));
        }
      }
      return svg;
    });
  }

  /** Gains on every reward in base SD, one table for each method. */
  function drawMatrix() {
    const shown = chosen(state.rewards), rows = chosen(state.trained), arms = chosen(state.arms);
    const cells = (a) => rows.map((t) => shown.map((e) => data.gains[t][a][e]?.standardised_interval ?? [null, null, null]));
    const most = Math.max(1e-9, ...arms.flatMap((a) => cells(a).flat().map(([mean]) => Math.abs(mean ?? 0))));
    for (const a of arms) {
      const head = node("tr", {}, node("th", { scope: "col" }, "scored by"), ...rows.map((t) => node("th", { scope: "col", class: "number" }, `${data.relation} ${data.rewards[own(t)].name}`)));
      const found = cells(a);
      const lines = shown.map((e, j) => node("tr", {}, node("th", { scope: "row" }, data.rewards[e].name), ...rows.map((t, i) => {
        const [mean] = found[i][j];
        return node("td", { class: `number cell ${mean < 0 ? "down" : "up"}${e === own(t) ? " own" : ""}`, "--share": `${(45 * Math.abs(mean ?? 0)) / most}%` }, estimate(found[i][j]));
      })));
      charts.append(node("figure", { class: "panel table" },
        node("figcaption", {}, node("strong", {}, swatch(data.arms[a]), node("bdi", {}, data.arms[a].label)), node("span", {}, "gain (base SD) [95 % interval over seeds]")),
        node("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": `Gains of ${data.arms[a].label} on every reward` }, node("table", {}, node("thead", {}, head), node("tbody", {}, ...lines)))));
    }
    scrollBoxes();
  }

  function draw() {
    hint("");
    charts.replaceChildren();
    waiting = [];
    byId("axis-box").hidden = state.view !== "curves";
    if (state.arms.size && state.trained.size) {
      const paint = { gains: drawGains, curves: drawCurves, price: drawPrice };
      if (state.view === "matrix") drawMatrix();
      else for (const pair of panels()) paint[state.view](pair);
    }
    for (const paint of waiting.map((measure) => measure())) paint();
    const number = charts.children.length;
    const empty = { curves: "No curve was recorded for this choice: curves exist for a training reward, its held-out measure and gold metrics.", price: "Choose another reward under “Scored by”." };
    if (!number) charts.append(node("p", { class: "empty" }, state.arms.size && state.trained.size ? empty[state.view] ?? "Choose a reward." : "Choose at least one method and one training reward."));
    status.textContent = `${VIEWS[state.view]}: ${state.arms.size} of ${data.arms.length} ${data.arms.length === 1 ? "method" : "methods"}, ${number} ${number === 1 ? "panel" : "panels"}.`;
    markCurrent();
  }

  // ---- pictures

  const cellName = () => data.cells[state.chosen.t][state.chosen.a][state.chosen.i];
  const has = (point, place) => Boolean(point) && ((parseInt(data.masks[point.stored][place >> 2], 16) >> (place % 4)) & 1) === 1;

  /** What the slider walks over: the base model, then the points of the cell that have pictures. */
  const steps = () => [null, ...(data.stored[cellName()] ?? [])];

  /** Ring the chosen seed in every chart; of a curve the point that the slider stands at. */
  function markCurrent() {
    if (!state.chosen) return;
    const { t, a, i } = state.chosen, at = steps()[state.step]?.spent[0];
    for (const mark of charts.querySelectorAll(".point")) {
      const { key, spent } = mark.dataset;
      mark.classList.toggle("current", key === `${t}/${a}/${i}` && (spent === undefined || Math.abs(Number(spent) - at) < 0.5));
    }
  }

  function focusPoint() {
    const { t, a, i } = state.chosen;
    charts.querySelector(`[data-key="${t}/${a}/${i}"]`)?.focus();
  }

  function stepText(point) {
    if (!point) return "before training (base model)";
    const spent = point.spent[0] > 0 ? `after ${thousands(point.spent[0])} queries` : "as evaluated";
    return point.point === "final" ? `${spent} (final)` : spent;
  }

  function picture(cell, point, place, text) {
    const [identity, prompt, noise] = data.prompts[place];
    if (!has(point, place)) return node("div", { class: "missing" }, "not stored");
    const inside = point.pictures[place];
    const path = [data.root, ...["cells", cell, "images", point.point, `${identity}--${noise}.png`].map(encodeURIComponent)].join("/");
    const image = node("img", { alt: `${text}: ${prompt}`, loading: inside ? "eager" : "lazy", src: inside ? `data:image/webp;base64,${inside}` : path });
    image.addEventListener("error", () => image.replaceWith(node("div", { class: "missing" }, "The run’s folder is not beside this page.")));
    return image;
  }

  const scored = (value) => (isNumber(value) ? fixed(value, 2) : "");

  function pair(place) {
    const { t, a } = state.chosen, base = data.stored[data.base]?.at(-1), at = steps()[state.step];
    const shown = at ? picture(cellName(), at, place, `${data.arms[a].label}, ${stepText(at)}`) : picture(data.base, base, place, "before training");
    const score = at ? at.scores[place] : data.base_scores[t][place];
    const half = (image, name, value, colour) => node("div", { class: "half", "--c": colour }, image, node("span", { class: "who" }, name), node("span", { class: "score" }, scored(value)));
    return node("figure", { class: "pair" },
      node("div", { class: "halves" },
        half(picture(data.base, base, place, "Base model"), "base", data.base_scores[t][place], null),
        half(shown, shortened(data.arms[a].label, 16), score, data.arms[a].colour)),
      node("figcaption", { dir: "auto", title: data.prompts[place][1] }, data.prompts[place][1]));
  }

  function showPairs() {
    const size = innerWidth < 700 ? 6 : 12, wanted = state.filter.toLowerCase();
    const places = [...data.prompts.keys()].filter((place) => data.prompts[place][1].toLowerCase().includes(wanted));
    const pages = Math.max(Math.ceil(places.length / size), 1);
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const start = state.page * size, shown = places.slice(start, start + size);
    byId("pairs").replaceChildren(...shown.map(pair));
    byId("count").textContent = places.length ? `${start + 1}–${start + shown.length} of ${places.length}` : "no prompt has this text";
    byId("back").disabled = state.page === 0;
    byId("forth").disabled = state.page === pages - 1;
  }

  function showDetail() {
    const { t, a, i } = state.chosen, arm = data.arms[a], gain = data.gains[t][a][own(t)], reward = data.rewards[own(t)];
    const found = steps(), along = found.length > 2;
    const slider = node("input", { type: "range", id: "step", min: 0, max: found.length - 1, step: 1, value: state.step });
    const told = node("output", { for: "step" });
    const tell = () => { told.textContent = stepText(found[state.step]); slider.setAttribute("aria-valuetext", told.textContent); };
    slider.addEventListener("input", () => { state.step = Number(slider.value); tell(); showPairs(); markCurrent(); });
    const filter = node("input", { type: "search", id: "filter", value: state.filter, autocomplete: "off", placeholder: "part of a prompt" });
    filter.addEventListener("input", () => { state.filter = filter.value; state.page = 0; showPairs(); });
    const turn = (id, by, text, name) => node("button", { type: "button", id, "aria-label": name, onclick: () => { state.page += by; showPairs(); } }, text);
    detail.hidden = false;
    const stop = found.length === 1 ? node("p", { class: "empty" }, "This cell has no stored pictures.") : along ? "" : node("p", { class: "note" }, "No pictures along training were stored for this cell: the slider goes from the base model to the end.");
    const places = Math.max(decimals((gain.interval[2] - gain.interval[1]) / 2), 2);
    detail.replaceChildren(
      node("h3", { tabindex: -1, id: "detail-title" }, swatch(arm), node("bdi", {}, arm.label), `, seed ${gain.seeds[i]}`),
      node("p", {}, `${data.relation[0].toUpperCase()}${data.relation.slice(1)} ${reward.name}; final gain ${fixed(gain.values[i], places)} ${reward.unit} on held-out prompts. Under each picture its score by ${reward.name}; both pictures of a pair have the same prompt and initial latent.`),
      node("div", { class: "tools" },
        node("div", { class: "slider" }, node("label", { for: "step" }, "Training"), slider, told),
        node("div", { class: "filter" }, node("label", { for: "filter" }, "Prompts"), filter, turn("back", -1, "‹", "Previous prompts"), node("span", { id: "count", role: "status" }), turn("forth", 1, "›", "Next prompts"))),
      stop,
      node("div", { id: "pairs" }),
      node("button", { type: "button", class: "quiet", onclick: focusPoint }, "Back to the chart"));
    tell();
    showPairs();
  }

  /** Show a seed's pictures, at the point of training where so much was spent (default: the end). */
  function select(what, spent, move) {
    state.chosen = what;
    const found = steps(), at = found.findIndex((point) => point && isNumber(spent) && Math.abs(point.spent[0] - spent) < 0.5);
    state.step = at > 0 ? at : found.length - 1;
    showDetail();
    markCurrent();
    if (isNumber(spent) && at < 0) detail.querySelector(".tools").after(node("p", { class: "note" }, `No pictures are stored at ${thousands(spent)} queries; these are the last ones.`));
    if (!move) return;
    hint("");
    byId("detail-title").focus({ preventScroll: true });
    detail.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  /** The median seed of the first method that has pictures inside the page, so that there is something to see at once. */
  function first() {
    for (const t of data.trained.keys())
      for (const a of data.arms.keys()) {
        const i = data.shown[t][a];
        if (isNumber(i) && data.stored[data.cells[t][a][i]]?.at(-1)?.pictures[0]) return { t, a, i };
      }
    return null;
  }

  byId("explorer").hidden = false;
  controls();
  draw();
  const start = first();
  if (start) select(start, null, false);
  let width = innerWidth, resized = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(resized);
    resized = setTimeout(() => { draw(); scrollBoxes(); }, 150);
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hint(""); });
}

themes();
contents();
for (const table of document.querySelectorAll("main table")) sortable(table);
scrollBoxes();
for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", scrollBoxes);
addEventListener("resize", scrollBoxes);
paper();
const stored = byId("explorer-data");
if (stored) explore(JSON.parse(stored.textContent));
