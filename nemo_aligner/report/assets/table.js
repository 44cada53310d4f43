// The table of prompts and samples: only the rows in the window are elements, whatever their number.

const narrow = matchMedia("(max-width: 760px)");
const table = {before: null, after: null, items: [], shown: [], open: new Map(), elements: new Map(), columns: [], pattern: null, range: [0, 1]};
const rowHeight = () => narrow.matches ? 112 : 64;
const CHANGED = 1e-12;

function tableColumns() {
  const functions = Object.keys(table.after.functions), compared = table.before !== null, single = choice.mode === "samples";
  const own = (key, label, of, title, tint = true) => ({key, label, of, title, tint});
  return [
    ...(compared ? [own("old", "before", item => item.before?.mean, "mean reward of the set on the left")] : []),
    own("mean", single ? "reward" : compared ? "after" : "mean", item => item.after?.mean, single ? "reward" : "mean reward"),
    ...(compared ? [own("change", "change", item => item.change, "mean after minus mean before", false)] : []),
    ...(single ? [] : [own("best", "best", item => item.after?.best, "best sample"), own("worst", "worst", item => item.after?.worst, "worst sample")]),
    ...functions.slice(0, 4).map(name => own(`function ${name}`, name, item => item.after?.functions[name], `mean of ${name}`, false)),
    own("n", single ? "length" : "n", item => single ? item.after.length : item.after?.n, single ? "characters" : "samples", false),
  ].map(column => single && column.key === "n" ? {...column, key: "length"} : column);
}

// place of a reward between the 5th and the 95th percentile of the sets, 0 to 1
function standing(reward) {
  const [low, high] = table.range;
  return high > low ? Math.min(1, Math.max(0, (reward - low) / (high - low))) : 0.5;
}

function tinted(element, reward) {
  if (known(reward)) element.style.setProperty("--standing", standing(reward).toFixed(3));
  element.classList.toggle("tinted", known(reward));
  return element;
}

function cell(column, item) {
  const value = column.of(item);
  const text = column.key === "change" && known(value) ? (value > 0 ? "+" : "") + number(value) : number(value);
  const element = make("span", {className: "cell", title: column.title}, narrow.matches ? make("i", {}, column.label) : null, text);
  if (column.tint) tinted(element, value);
  if (column.key === "change" && known(value) && Math.abs(value) > CHANGED) element.classList.add(value > 0 ? "up" : "down");
  return element;
}

// a row's text, without line ends and the marks of a chat template, which are in the opened row
const oneLine = text => text.replace(/<\|[^|<>]{1,40}\|>(?:(?:system|user|assistant)\b)?|\s+/g, " ").replace(/ {2,}/g, " ").trim();

function preview(item) {
  const columns = item.after ? table.after : table.before, own = item.after ?? item.before;
  const row = own.rows.reduce((best, one) => (columns.reward[one] ?? -Infinity) > (columns.reward[best] ?? -Infinity) ? one : best, own.rows[0]);
  return columns.output[row];
}

function rowElement(item) {
  const isOpen = table.open.has(item.order), text = oneLine(item.output ?? preview(item));
  const line = make("div", {className: "row line", role: "button", tabIndex: 0, "aria-expanded": String(isOpen)},
    make("span", {className: "texts"},
      make("span", {className: "prompt"}, ...highlighted(oneLine(item.prompt), table.pattern)),
      make("span", {className: "preview"}, ...(text ? highlighted(text, table.pattern) : [make("em", {}, "empty")]))),
    ...table.columns.map(column => cell(column, item)));
  const element = make("div", {className: `entry${isOpen ? " open" : ""}`}, line, isOpen ? details(item) : null);
  line.addEventListener("click", () => toggle(item));
  line.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(item, true); }
    const step = {ArrowDown: "nextSibling", ArrowUp: "previousSibling"}[event.key];
    if (step) { event.preventDefault(); neighbour(element, event.key === "ArrowDown" ? 1 : -1)?.focus(); }
  });
  return element;
}

function neighbour(element, step) {
  const place = [...table.elements].find(([, own]) => own === element)?.[0];
  return table.elements.get(place + step)?.firstChild;
}

// ---- an opened row ----

const SAMPLES_SHOWN = 24;

function details(item) {
  const both = item.before && item.after, sides = [];
  const ranked = (columns, rows) => [...rows].sort((a, b) => (columns.reward[b] ?? -Infinity) - (columns.reward[a] ?? -Infinity));
  const old = item.before ? ranked(table.before, item.before.rows) : [], fresh = item.after ? ranked(table.after, item.after.rows) : [];
  // the best with the best, the second with the second
  const parts = fresh.map((row, i) => both && i < old.length && i < SAMPLES_SHOWN ? difference(table.before.output[old[i]], table.after.output[row]) : null);
  const side = (name, columns, rows, kind) => make("div", {className: "side"}, table.before ? make("h4", {}, name) : null, samplesList(columns, rows, parts, kind));
  if (table.before) sides.push(side(choiceName("before"), table.before, old, "gone"));
  sides.push(side(choiceName("after"), table.after, fresh, "new"));
  return make("div", {className: "details"}, make("div", {className: "whole-prompt"}, ...highlighted(item.prompt, table.pattern)),
    make("div", {className: `sides${table.before ? " two" : ""}`}, ...sides));
}

function samplesList(columns, rows, parts, kind) {
  const list = make("div");
  const add = (from, to) => rows.slice(from, to).forEach((row, i) => list.append(sampleCard(columns, row, parts[from + i] ?? null, kind)));
  add(0, SAMPLES_SHOWN);
  if (rows.length > SAMPLES_SHOWN) {
    const more = make("button", {className: "more"}, `${rows.length - SAMPLES_SHOWN} more`);
    more.addEventListener("click", () => { more.remove(); add(SAMPLES_SHOWN); });
    list.append(more);
  }
  return rows.length ? list : make("p", {className: "hint"}, "not in this set");
}

function sampleCard(columns, row, parts, kind) {
  const text = columns.output[row];
  const chips = [
    tinted(make("span", {className: "chip reward", title: "reward"}, number(columns.reward[row])), columns.reward[row]),
    ...Object.entries(columns.functions).map(([name, values]) => make("span", {className: "chip"}, make("i", {}, name), number(values[row]))),
    columns.kept[row] ? make("span", {className: "chip kept"}, "trained on") : null,
    ...Object.entries(columns.others).filter(([, values]) => values[row] !== null).map(([name, values]) => make("span", {className: "chip plain"}, make("i", {}, name), typeof values[row] === "number" ? number(values[row]) : String(values[row]))),
  ];
  const body = parts && !table.pattern ? marked(text, parts, kind) : highlighted(text, table.pattern);
  return make("div", {className: "sample"}, make("div", {className: "chips"}, ...chips), make("div", {className: "text"}, ...(text ? body : [make("em", {}, "empty")])));
}

// ---- which rows are elements ----

const grown = new ResizeObserver(entries => {
  let moved = false;
  for (const {target} of entries) {
    const item = target.item, extra = Math.max(0, target.offsetHeight - rowHeight());
    if (target.isConnected && table.open.has(item.order) && table.open.get(item.order) !== extra) {
      table.open.set(item.order, extra);
      moved = true;
    }
  }
  if (moved) { measure(); show(); }
});

let openPlaces = []; // [[place, extra height, sum of extra heights before it]], in order

function measure() {
  openPlaces = [];
  if (table.open.size) table.shown.forEach((item, place) => { if (table.open.has(item.order)) openPlaces.push([place, table.open.get(item.order), 0]); });
  let sum = 0;
  for (const own of openPlaces) { own[2] = sum; sum += own[1]; }
  at("list").style.height = `${table.shown.length * rowHeight() + sum}px`;
}

function topOf(place) {
  let extra = 0;
  for (const [other, own, before] of openPlaces) { if (other >= place) break; extra = before + own; }
  return place * rowHeight() + extra;
}

function placeAt(y) {
  let low = 0, high = table.shown.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (topOf(middle + 1) <= y) low = middle + 1; else high = middle;
  }
  return low;
}

function show() {
  if (at("samples").hidden || !table.after) return;
  const list = at("list"), top = -list.getBoundingClientRect().top;
  const first = placeAt(Math.max(0, top - 600)), last = Math.min(table.shown.length - 1, placeAt(top + innerHeight + 600));
  for (const [place, element] of table.elements)
    if (place < first || place > last || element.item !== table.shown[place]) { grown.unobserve(element); element.remove(); table.elements.delete(place); }
  for (let place = first; place <= last; place++) {
    let element = table.elements.get(place);
    if (!element) {
      element = rowElement(table.shown[place]);
      element.item = table.shown[place];
      table.elements.set(place, element);
      list.append(element);
      if (table.open.has(element.item.order)) grown.observe(element);
    }
    element.style.top = `${topOf(place)}px`;
  }
}

function clear() {
  for (const element of table.elements.values()) { grown.unobserve(element); element.remove(); }
  table.elements.clear();
}

function toggle(item, focus = false) {
  if (!table.open.delete(item.order)) table.open.set(item.order, 0);
  const place = table.shown.indexOf(item);
  table.elements.get(place)?.remove();
  table.elements.delete(place);
  measure();
  show();
  if (focus) table.elements.get(place)?.firstChild.focus();
  remember({open: [...table.open.keys()]});
}

// ---- choosing ----

function choiceName(which) {
  const own = report.sets[choice[which]];
  return own ? setName(own) : "";
}

function filterAndShow() {
  const pattern = patternOf(choice.query);
  at("query").classList.toggle("wrong", pattern === undefined);
  table.pattern = pattern ?? null;
  table.shown = chosen(table.items, table.before, table.after, table.pattern);
  const what = choice.mode === "prompts" ? "prompt" : "sample", all = table.items.length;
  const set = report.sets[choice.after];
  at("count").textContent = `${table.shown.length === all ? "" : `${table.shown.length.toLocaleString("en")} of `}${all.toLocaleString("en")} ${what}${all === 1 ? "" : "s"}`
    + (set.samples < set.of ? `; ${set.samples.toLocaleString("en")} of the set's ${set.of.toLocaleString("en")} samples are in this page` : "") + (set.whole ? "" : "; the run has not ended");
  drawHead();
  clear();
  measure();
  show();
  remember({choice});
}

function drawHead() {
  const {key, down} = choice.sort;
  const button = (own, label, title) => {
    const element = make("button", {className: "cell", title, "aria-sort": key === own ? (down ? "descending" : "ascending") : "none"}, label, key === own ? (down ? " ↓" : " ↑") : "");
    element.addEventListener("click", () => sortBy(own, key === own ? !down : own !== "prompt"));
    return element;
  };
  at("head").replaceChildren(button("prompt", choice.mode === "prompts" ? "prompt, and its best response" : "prompt, and the response", "by prompt"), ...table.columns.map(column => button(column.key, column.label, column.title)));
  const keys = [["order", "order of the file"], ["prompt", "prompt"], ...table.columns.map(column => [column.key, column.label]), ["spread", "spread"], ["length", "length"], ...Object.keys(table.after.functions).slice(4).map(name => [`function ${name}`, name])];
  at("sort").replaceChildren(...new Map(keys.flatMap(([own, label]) => [[`${own}|down`, `${label} ↓`], [`${own}|up`, `${label} ↑`]])).entries().map(([value, label]) => make("option", {value, selected: value === `${key}|${down ? "down" : "up"}`}, label)));
  for (const element of at("quick").children) element.setAttribute("aria-pressed", String(element.dataset.key === key && (element.dataset.down === "yes") === down));
  for (const element of at("quick").children) element.hidden = element.dataset.key === "change" && !table.before || element.dataset.key === "spread" && choice.mode === "samples";
}

function sortBy(key, down) {
  choice.sort = {key, down};
  filterAndShow();
}

async function changeSets() {
  const wanted = `${choice.before} ${choice.after} ${choice.mode}`;
  at("count").textContent = "unpacking…";
  const alone = choice.mode === "samples" || choice.before === null;
  const [before, after] = await Promise.all([alone ? null : samplesOf(choice.before), samplesOf(choice.after)]);
  if (wanted !== `${choice.before} ${choice.after} ${choice.mode}`) return;
  const quantiles = [after, before].map((own, i) => own && report.sets[i ? choice.before : choice.after].quantiles).filter(own => own?.length);
  const range = quantiles.length ? [Math.min(...quantiles.map(own => own[5])), Math.max(...quantiles.map(own => own[95]))] : [0, 1];
  Object.assign(table, {before, after, range, items: choice.mode === "prompts" ? promptItems(before, after) : sampleItems(after)});
  table.columns = tableColumns();
  document.documentElement.style.setProperty("--columns", `minmax(0, 1fr) repeat(${table.columns.length}, minmax(4.2rem, max-content))`);
  document.documentElement.style.setProperty("--count", table.columns.length);
  at("kept-label").hidden = !after.kept.length;
  if (!after.kept.length) choice.kept = "";
  if (choice.sort.key !== "order" && !table.columns.some(column => column.key === choice.sort.key) && !["prompt", "spread", "length"].includes(choice.sort.key) && !choice.sort.key.startsWith("function ")) choice.sort = {key: "order", down: false};
  filterAndShow();
}

function prepareTable() {
  const option = (own, value) => make("option", {value, selected: value === own}, report.sets[value].name + (report.sets[value].whole ? "" : " (so far)"));
  const options = own => {
    const groups = new Map();
    report.sets.forEach((set, place) => {
      const label = many() ? `${runName(set.run)} · ${set.series}` : set.series;
      groups.set(label, [...groups.get(label) ?? [], option(own, place)]);
    });
    return [...groups].map(([label, members]) => make("optgroup", {label}, ...members));
  };
  at("before").replaceChildren(make("option", {value: ""}, "nothing"), ...options(choice.before));
  at("after").replaceChildren(...options(choice.after));
  at("before").value = choice.before ?? "";
  for (const [name, key, down] of [["Best first", "mean", true], ["Worst first", "mean", false], ["Most improved", "change", true], ["Most worsened", "change", false], ["Widest spread", "spread", true]]) {
    const button = make("button", {}, name);
    Object.assign(button.dataset, {key, down: down ? "yes" : "no"});
    button.addEventListener("click", () => choice.sort.key === key && choice.sort.down === down ? sortBy("order", false) : sortBy(key, down));
    at("quick").append(button);
  }
  const pick = which => () => { choice[which] = at(which).value === "" ? null : Number(at(which).value); table.open.clear(); changeSets(); };
  at("before").addEventListener("change", pick("before"));
  at("after").addEventListener("change", pick("after"));
  at("sort").addEventListener("change", () => { const [key, way] = at("sort").value.split("|"); sortBy(key, way === "down"); });
  const mode = (id, name) => at(id).addEventListener("click", () => setMode(name));
  mode("by-prompt", "prompts");
  mode("by-sample", "samples");
  let waiting;
  const later = (id, take) => at(id).addEventListener("input", () => { take(at(id).value); clearTimeout(waiting); waiting = setTimeout(filterAndShow, 150); });
  later("query", value => { choice.query = value; });
  later("low", value => { choice.low = value === "" ? null : Number(value); });
  later("high", value => { choice.high = value === "" ? null : Number(value); });
  at("kept").addEventListener("change", () => { choice.kept = at("kept").value; filterAndShow(); });
  at("query").value = choice.query;
  at("low").value = choice.low ?? "";
  at("high").value = choice.high ?? "";
  at("kept").value = choice.kept;
  addEventListener("scroll", () => requestAnimationFrame(show), {passive: true});
  addEventListener("resize", () => { clear(); measure(); show(); });
  narrow.addEventListener("change", () => { if (table.after) { clear(); measure(); show(); } });
  showMode();
}

function setMode(name) {
  choice.mode = name;
  table.open.clear();
  showMode();
  changeSets();
}

function showMode() {
  at("by-prompt").setAttribute("aria-pressed", String(choice.mode === "prompts"));
  at("by-sample").setAttribute("aria-pressed", String(choice.mode === "samples"));
  at("before").disabled = choice.mode === "samples";
}
