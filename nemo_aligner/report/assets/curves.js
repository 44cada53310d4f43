// Learning curves: one small chart for each scalar, the same of several runs in one; and seconds by stage.

// [{run, part, tag, curve}] whose last word is `name`
function curvesNamed(name) {
  return everyCurve().filter(own => own.tag.split("/").at(-1) === name);
}

function everyCurve() {
  return report.runs.flatMap((run, place) => Object.entries(run.curves).flatMap(([folder, curves]) => {
    const [, part, iteration] = folder.match(/^(.*iterations)\/(\d+)$/) ?? [null, folder, null]; // those of a loop together
    return Object.entries(curves).map(([tag, curve]) => ({run: place, part, iteration, tag, curve}));
  }));
}

// exponential moving average, with the weight of what came before the first point taken out
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map(value => {
    if (!known(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function scalarsChart(curves, title = "", weight = 0, isLog = false, unit = "", fromZero = false) {
  const together = curves.length > 1;
  const isNamed = new Set(curves.map(own => `${own.tag} ${own.iteration}`)).size > 1; // a run has its colour in the page's head
  const traces = curves.flatMap((own, place) => {
    const ofRuns = new Set(curves.map(one => one.run)).size > 1, tags = [...new Set(curves.map(one => one.tag))];
    const tone = colour(ofRuns ? own.run : place);
    const name = [ofRuns && !isNamed ? runName(own.run) : "", own.iteration === null ? "" : `iteration ${own.iteration}`, curves.some(one => one.tag !== own.tag) ? own.tag.split("/")[0] : ""].filter(Boolean).join(" ") || own.part || own.tag;
    const {steps: x, values: y} = own.curve;
    const mode = x.length < 30 ? "lines+markers" : "lines";
    const line = {x, y: weight ? smoothed(y, weight) : y, mode, marker: {size: 4}, line: {color: tone, width: 1.8, dash: ofRuns ? ["solid", "dot", "dash"][tags.indexOf(own.tag) % 3] : "solid"}, name, showlegend: isNamed && !curves.slice(0, place).some(one => one.tag === own.tag && one.iteration === own.iteration), hovertemplate: `step %{x}: %{y:.5g}<extra>${together ? "%{fullData.name}" : ""}</extra>`};
    return weight ? [{...line, y, opacity: 0.25, showlegend: false, hoverinfo: "skip", hovertemplate: undefined}, line] : [line];
  });
  return {traces, layout: {xaxis: {title: unit}, yaxis: {title, type: isLog ? "log" : "linear", rangemode: fromZero ? "tozero" : "normal"}, ...(unit ? {} : {margin: {l: 44, r: 12, t: 6, b: 26}})}};
}

function drawCurves() {
  const query = at("curve-query").value.toLowerCase(), place = at("curves");
  const weight = () => Number(at("smoothing").value), isLog = () => at("log-scale").checked;
  forget(place);
  const groups = new Map(); // part, then tag
  for (const own of everyCurve()) {
    if (!`${own.part} ${own.tag}`.toLowerCase().includes(query)) continue;
    if (!groups.has(own.part)) groups.set(own.part, new Map());
    const tags = groups.get(own.part);
    if (!tags.has(own.tag)) tags.set(own.tag, []);
    tags.get(own.tag).push(own);
  }
  let count = 0;
  for (const [part, tags] of groups) {
    const last = tag => tag.startsWith("timers/");
    const charts = [...tags].sort(([a], [b]) => last(a) - last(b) || a.localeCompare(b)).map(([tag, curves]) => {
      const every = Math.max(...curves.map(own => own.curve.every));
      return chart(tag, () => scalarsChart(curves, "", weight(), isLog()), {height: 190, note: every > 1 ? `every ${every}th point` : ""});
    });
    count += charts.length;
    place.append(make("details", {open: true, className: "group"}, make("summary", {}, part || report.title, make("span", {className: "hint"}, ` ${[charts.length, ...report.runs.map(run => run.seconds[part]).filter(Boolean).map(duration)].join(" · ")}`)), make("div", {className: "charts small"}, ...charts)));
  }
  at("curve-count").textContent = count ? `${count} curves` : everyCurve().length ? "no curve matches" : "no scalars were logged";
}

function times() {
  return report.runs.flatMap((run, place) => run.times.map(own => ({...own, title: [many() ? run.name : "", own.title].filter(Boolean).join(" · ")})));
}

function timesChart(own) {
  const traces = Object.entries(own.stages).map(([stage, seconds], place) => ({type: "bar", x: own.labels.map(String), y: seconds, name: stage, marker: {color: colour(place)}, hovertemplate: `${own.unit} %{x}: %{y:.3g} s<extra>%{fullData.name}</extra>`}));
  return {traces, layout: {barmode: "stack", bargap: 0.25, xaxis: {title: own.unit, type: "category"}, yaxis: {title: "seconds"}}};
}

function drawTimes() {
  for (const own of times()) {
    const totals = Object.entries(own.stages).map(([stage, seconds]) => `${stage} ${duration(seconds.reduce((a, b) => a + b, 0))}`);
    at("times").append(chart(`Time per stage${own.title ? `: ${own.title}` : ""}`, () => timesChart(own), {note: totals.join(" · ")}));
  }
}
