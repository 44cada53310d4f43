// Plotly with the page's colours; a chart is drawn when it comes near the window, and again when the colours change.

const COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#06b6d4", "#ef4444", "#84cc16"];
const colour = place => COLOURS[place % COLOURS.length];
const faint = (hex, alpha) => `rgba(${[1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

let library = null;

function plotly() {
  library ??= unpacked("plotly").then(source => {
    document.head.append(make("script", {textContent: source}));
    return window.Plotly;
  });
  return library;
}

function layout(given) {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(name => style.getPropertyValue(name).trim());
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, tickfont: {color: soft}};
  const titled = own => ({...axis, ...own, title: own?.title ? {text: own.title, font: {size: 12, color: soft}, standoff: 8} : undefined});
  return {
    font: {family: "system-ui, sans-serif", size: 12, color: ink},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: {l: 48, r: 16, t: 8, b: 40},
    legend: {orientation: "h", y: 1, yanchor: "bottom", x: 0, font: {color: soft}},
    hoverlabel: {bgcolor: card, bordercolor: line, font: {color: ink}},
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    ...given,
    xaxis: titled(given.xaxis),
    yaxis: titled(given.yaxis),
  };
}

const drawn = new Map(); // element → how it is drawn
const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting && drawn.has(target)) {
      seen.unobserve(target);
      draw(target);
    }
  }
}, {rootMargin: "300px"});

async function draw(place) {
  const Plotly = await plotly();
  const how = drawn.get(place);
  if (!how || !place.isConnected) return;
  const {traces, layout: own} = how();
  await Plotly.react(place, traces, layout(own), {responsive: true, displayModeBar: false});
  place.dataset.drawn = "yes";
}

// A card with a chart; `how` gives {traces, layout} each time it is drawn.
function chart(title, how, {note = "", className = "", height = 280} = {}) {
  const place = make("div", {className: "plot", style: {height: `${height}px`}});
  const card = make("figure", {className: `card ${className}`},
    make("figcaption", {}, make("b", {}, title), note ? make("span", {className: "hint"}, note) : null), place);
  drawn.set(place, how);
  seen.observe(place);
  return card;
}

function forget(container) {
  for (const place of container.querySelectorAll(".plot")) {
    drawn.delete(place);
    if (place.dataset.drawn) window.Plotly?.purge(place);
  }
  container.replaceChildren();
}

function redraw() {
  for (const place of drawn.keys()) if (place.dataset.drawn) draw(place);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// ---- the overview's charts, of one series ----

const axisUnit = series => series.sets.some(own => own.name.startsWith("step ")) ? "step" : series.sets.some(own => own.name.startsWith("iteration ")) ? "iteration" : "";
const hasRewards = own => own.known > 0;

function axisOf(series) {
  const unit = axisUnit(series);
  return {title: unit, ...(new Set(series.sets.map(own => own.at)).size < 12 && unit ? {dtick: unit === "iteration" ? 1 : undefined} : {})};
}

function perRun(series, of) {
  return report.runs.flatMap((run, place) => {
    const sets = ofRun(series, place);
    return sets.length ? of(sets, place, isOfSeveralRuns(series) ? `${run.name} ` : "") : [];
  });
}

function meanReward(series) {
  const traces = perRun(series, (all, run, prefix) => {
    const sets = all.filter(hasRewards), x = sets.map(own => own.at), text = sets.map(own => own.name), own = colour(run);
    const best = sets.map(one => one.best_of.at(-1));
    const found = [
      {x, y: sets.map(one => one.quantiles[90]), mode: "lines", line: {width: 0}, hoverinfo: "skip", showlegend: false, legendgroup: prefix ? run : undefined},
      {x, y: sets.map(one => one.quantiles[10]), mode: "lines", line: {width: 0}, fill: "tonexty", fillcolor: faint(own, 0.13), hoverinfo: "skip", name: "10–90 %", showlegend: !prefix, legendgroup: prefix ? run : undefined},
      {x, y: sets.map(one => one.mean), text, error_y: {type: "data", array: sets.map(one => one.standard_error), thickness: 1.5}, mode: "lines+markers", line: {color: own, width: 2.5}, name: prefix || "mean", legendgroup: prefix ? run : undefined, hovertemplate: "%{text}: %{y:.4g}<extra></extra>"},
    ];
    if (best.some(pair => pair && pair[0] > 1))
      found.push({x, y: best.map(pair => pair?.[2]), text: best.map(pair => pair ? `best of ${pair[0]}` : ""), mode: "lines+markers", line: {color: own, dash: "dot", width: 1.5}, marker: {size: 5}, name: `best of ${best.find(Boolean)[0]}`, showlegend: !prefix, legendgroup: prefix ? run : undefined, hovertemplate: "%{text}: %{y:.4g}<extra></extra>"});
    return found;
  });
  return {traces, layout: {xaxis: axisOf(series), yaxis: {title: "reward"}}};
}

// at most `most` of `values`, evenly spread, the last among them
function spread(values, most) {
  if (values.length <= most) return values;
  return Array.from({length: most}, (_, i) => values[Math.round(i * (values.length - 1) / (most - 1))]);
}

// pairs: [{label, left, right}] of quantiles; each drawn as one violin of two halves
function violins(pairs, names) {
  const half = (side, part, tone) => ({
    type: "violin", side, scalegroup: "all", scalemode: "width", width: 0.85, points: false, meanline: {visible: true}, spanmode: "hard",
    x: pairs.flatMap(pair => pair[part].map(() => pair.label)), y: pairs.flatMap(pair => pair[part]),
    name: names[part], line: {color: tone, width: 1.5}, fillcolor: faint(tone, 0.35), hoveron: "violins", hoverinfo: "y+name",
  });
  return {traces: [half("negative", "left", "#94a3b8"), half("positive", "right", COLOURS[0])],
    layout: {violinmode: "overlay", violingap: 0, xaxis: {type: "category"}, yaxis: {title: "reward"}}};
}

function beforeAndAfter(series) {
  return perRun(series, (all, run, prefix) => {
    const sets = spread(all.filter(hasRewards), 9);
    return sets.slice(1).map((own, i) => ({label: prefix + own.name, left: sets[i].quantiles, right: own.quantiles}));
  });
}

function keptPairs(series) {
  return perRun(series, (all, run, prefix) => spread(all.filter(own => own.kept_quantiles.length), 9)
    .map(own => ({label: prefix + own.name, left: own.quantiles, right: own.kept_quantiles})));
}

function rewardAndKl(series) {
  const traces = perRun(series, (all, run, prefix) => {
    const sets = all.filter(own => hasRewards(own) && known(own.kl)), own = colour(run);
    if (!sets.length) return [];
    const found = [{x: sets.map(one => one.kl), y: sets.map(one => one.mean), text: sets.map(one => one.name), mode: sets.length < 8 ? "lines+markers+text" : "lines+markers", textposition: "top center", textfont: {size: 11}, line: {color: own, width: 2}, marker: {size: 8}, cliponaxis: false,
      error_y: {type: "data", array: sets.map(one => one.standard_error), thickness: 1}, name: prefix || "policy", hovertemplate: "%{text}<br>KL %{x:.4g} nats, reward %{y:.4g}<extra></extra>"}];
    const bound = sets[0].best_of;
    if (bound.length > 1)
      found.push({x: bound.map(one => one[1]), y: bound.map(one => one[2]), text: bound.map(one => `best of ${one[0]}`), mode: "lines+markers", line: {color: "#94a3b8", dash: "dash"}, marker: {size: 6, symbol: "diamond"}, opacity: 0.9, name: `best of n of ${sets[0].name}`, showlegend: !prefix, hovertemplate: "%{text}<br>KL ≤ %{x:.4g} nats, reward %{y:.4g}<extra></extra>"});
    return found;
  });
  return {traces, layout: {xaxis: {title: "KL to the initial policy (nats a response)", rangemode: "tozero"}, yaxis: {title: "reward"}}};
}

function overSeries(series, value, title) {
  const traces = perRun(series, (sets, run, prefix) => {
    const own = sets.filter(one => known(value(one)));
    return own.length ? [{x: own.map(one => one.at), y: own.map(value), text: own.map(one => one.name), mode: "lines+markers", line: {color: colour(run), width: 2}, name: prefix || title, showlegend: Boolean(prefix), hovertemplate: "%{text}: %{y:.4g}<extra></extra>"}] : [];
  });
  return traces.length ? {traces, layout: {xaxis: axisOf(series), yaxis: {title, rangemode: "tozero"}}} : null;
}

function functionsOver(series) {
  const names = [...new Set(series.sets.flatMap(own => Object.keys(own.functions)))];
  return {traces: perRun(series, (sets, run, prefix) => names.map((name, place) => {
    const own = sets.filter(one => known(one.functions[name]?.mean));
    return {x: own.map(one => one.at), y: own.map(one => one.functions[name].mean), mode: "lines+markers", name: prefix + name, line: {color: colour(place), dash: ["solid", "dash", "dot", "dashdot"][run % 4]}, hovertemplate: `${"%{y:.4g}"}<extra></extra>`};
  })), layout: {xaxis: axisOf(series), yaxis: {title: "mean of each function"}}};
}

// sets of one series: [{set, name, tone}]
function histogramOf(own) {
  const [edges] = own[0].set.histogram;
  const middles = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  return {traces: own.map(({set, name, tone}) => ({type: "bar", x: middles, y: set.histogram[1].map(share => 100 * share), width: edges[1] - edges[0], name, opacity: 0.6, marker: {color: tone}, hovertemplate: "%{y:.3g} % near %{x:.3g}<extra></extra>"})),
    layout: {barmode: "overlay", bargap: 0.04, xaxis: {title: "reward"}, yaxis: {title: "% of samples"}}};
}

function drawSeries(series) {
  const place = at("reward-charts");
  forget(place);
  const sets = series.sets, rewarded = sets.filter(hasRewards), first = rewarded[0], last = rewarded.at(-1);
  const lasts = report.runs.map((_, run) => rewarded.filter(own => own.run === run).at(-1)).filter(Boolean);
  const add = (...given) => place.append(chart(...given));
  if (rewarded.length > 1) add("Reward", () => meanReward(series), {note: `± standard error${isOfSeveralRuns(series) ? "; dotted: best of n; band: 10–90 %" : ""}`});
  if (rewarded.length > 1 && beforeAndAfter(series).length)
    add("Reward before and after", () => violins(beforeAndAfter(series), {left: "before", right: "after"}), {note: axisUnit(series) ? `each half is one ${axisUnit(series)}'s policy` : ""});
  if (keptPairs(series).length) add("Drawn and trained on", () => violins(keptPairs(series), {left: "all drawn", right: "trained on"}));
  if (lasts.length > 1) add("Last of each run", () => histogramOf(lasts.map(set => ({set, name: setName(set), tone: colour(set.run)}))));
  else if (first === last && first) add("Distribution of rewards", () => histogramOf([{set: first, name: first.name, tone: COLOURS[0]}]));
  else if (first) add("First and last", () => histogramOf([{set: first, name: first.name, tone: "#94a3b8"}, {set: last, name: last.name, tone: COLOURS[0]}]));
  if (sets.some(own => hasRewards(own) && known(own.kl)))
    add("Reward against KL", () => rewardAndKl(series), {note: sets[0].best_of.length > 1 ? "dashed: best of n, at its bound ln n − (n−1)/n" : ""});
  if (sets.some(own => Object.keys(own.functions).length)) add("Each reward function", () => functionsOver(series));
  const logged = (tag, title, unit) => {
    const curves = curvesNamed(tag).filter(own => sets.some(set => set.run === own.run));
    if (curves.length) add(title, () => scalarsChart(curves, unit, 0, false, "step", true), {note: "logged in training"});
    return curves.length > 0;
  };
  if (!logged("generation_length", "Length of responses", "tokens") && sets.length > 1) {
    const tokens = overSeries(series, own => own.tokens, "tokens");
    const length = tokens ?? overSeries(series, own => own.characters, "characters");
    if (length) add("Length of responses", () => overSeries(series, own => tokens ? own.tokens : own.characters, tokens ? "tokens" : "characters"));
  }
  const entropy = () => overSeries(series, own => own.entropy, "nats a token");
  if (!logged("entropy", "Entropy", "nats a token") && sets.length > 1 && entropy()) add("Entropy", entropy);
}
