// What the table shows: prompts or samples of one set or two, filtered and in order.

const choice = {before: null, after: null, mode: "prompts", sort: {key: "order", down: false}, query: "", low: null, high: null, kept: ""};

// /regex/ or plain words; null for nothing, undefined for what is no regular expression
function patternOf(query) {
  if (!query) return null;
  const regex = query.match(/^\/(.+)\/$/s);
  try {
    return new RegExp(regex ? regex[1] : query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu");
  } catch {
    return undefined;
  }
}

const mean = values => values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;

function statistics(columns, rows) {
  const rewards = rows.map(row => columns.reward[row]).filter(known);
  const average = mean(rewards);
  return {
    mean: average, n: rows.length,
    best: rewards.length ? rewards.reduce((a, b) => Math.max(a, b)) : null,
    worst: rewards.length ? rewards.reduce((a, b) => Math.min(a, b)) : null,
    spread: rewards.length > 1 ? Math.sqrt(rewards.reduce((sum, own) => sum + (own - average) ** 2, 0) / (rewards.length - 1)) : null,
    length: mean(rows.map(row => columns.output[row].length)),
    functions: Object.fromEntries(Object.entries(columns.functions).map(([name, values]) => [name, mean(rows.map(row => values[row]).filter(known))])),
  };
}

// one item a prompt: {order, prompt, after: {rows, ...statistics} | null, before: ...}
function promptItems(before, after) {
  const items = after.prompts.map((prompt, place) => {
    const rows = after.rows[place], other = before?.place.get(prompt);
    const old = other === undefined ? null : {rows: before.rows[other], ...statistics(before, before.rows[other])};
    const own = {rows, ...statistics(after, rows)};
    return {order: place, prompt, after: own, before: old, change: old && known(own.mean) && known(old.mean) ? own.mean - old.mean : null};
  });
  if (before)
    before.prompts.forEach((prompt, place) => {
      if (!after.place.has(prompt)) items.push({order: items.length, prompt, after: null, before: {rows: before.rows[place], ...statistics(before, before.rows[place])}, change: null});
    });
  return items;
}

function sampleItems(after) {
  return after.output.map((output, row) => ({order: row, prompt: after.prompts[after.prompt[row]], output, after: {rows: [row], mean: after.reward[row], best: after.reward[row], worst: after.reward[row], spread: null, n: 1, length: output.length,
    functions: Object.fromEntries(Object.entries(after.functions).map(([name, values]) => [name, values[row]]))}, before: null, change: null}));
}

function chosen(items, before, after, pattern) {
  const {low, high, kept} = choice;
  const within = (own, columns) => own && own.rows.some(row =>
    (low === null || columns.reward[row] >= low && known(columns.reward[row])) && (high === null || columns.reward[row] <= high && known(columns.reward[row]))
    && (!kept || columns.kept[row] === (kept === "yes")));
  const hit = text => { pattern.lastIndex = 0; return pattern.test(text); };
  const matches = item => hit(item.prompt)
    || item.after?.rows.some(row => hit(after.output[row])) || item.before?.rows.some(row => hit(before.output[row]));
  const bounded = low !== null || high !== null || kept;
  const found = items.filter(item => (!bounded || within(item.after, after) || !kept && within(item.before, before)) && (!pattern || matches(item)));
  return ordered(found);
}

function sortValue(item, key) {
  const own = item.after ?? item.before;
  if (key === "order") return item.order;
  if (key === "prompt") return item.prompt;
  if (key === "change") return item.change;
  if (key === "old") return item.before?.mean;
  if (key.startsWith("function ")) return own.functions[key.slice(9)];
  return own[key];
}

// what has no value comes last, whichever way
function ordered(items) {
  const {key, down} = choice.sort, way = down ? -1 : 1;
  const keyed = items.map(item => [sortValue(item, key), item]);
  const lacks = value => value === null || value === undefined || Number.isNaN(value);
  keyed.sort(([a, x], [b, y]) => {
    if (lacks(a) || lacks(b)) return lacks(a) - lacks(b) || x.order - y.order;
    return (typeof a === "string" ? a.localeCompare(b) : a - b) * way || x.order - y.order;
  });
  return keyed.map(pair => pair[1]);
}
