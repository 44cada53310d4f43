// How policies that answered the same prompts compare: charts of an evaluation's figures.

const ranks = (row, name) => Object.keys(row).filter(key => key.startsWith(`${name}.`)).map(key => Number(key.slice(name.length + 1))).sort((a, b) => a - b);

// of `rows` that were compared with the first: how often they win, with interval, and at equal length
function winRates(rows) {
  const compared = rows.filter(row => known(row.win_rate)), x = compared.map(row => row.policy);
  const percent = name => compared.map(row => known(row[name]) ? 100 * row[name] : null);
  const away = end => compared.map(row => 100 * Math.abs((row.win_rate_interval?.[end] ?? row.win_rate) - row.win_rate));
  return {traces: [
    {x, y: percent("win_rate"), error_y: {type: "data", array: away(1), arrayminus: away(0), thickness: 1.5}, mode: "markers", marker: {size: 10, color: COLOURS[0]}, name: "wins", hovertemplate: "%{x}: %{y:.3g} %<extra></extra>"},
    {x, y: percent("win_rate_length_controlled"), mode: "markers", marker: {size: 10, symbol: "diamond-open", color: COLOURS[1]}, name: "at equal length", hovertemplate: "%{x}: %{y:.3g} % at equal length<extra></extra>"},
  ], layout: {xaxis: {type: "category"}, yaxis: {title: "% of pairs", range: [0, 100]},
    shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: 50, y1: 50, line: {color: "#94a3b8", dash: "dash", width: 1}}]}};
}

// a line a policy over k, of figures `name`.k
function overK(rows, name, title) {
  const all = [...new Set(rows.flatMap(row => ranks(row, name)))].sort((a, b) => a - b);
  return {traces: rows.map((row, place) => {
    const x = ranks(row, name);
    return {x, y: x.map(k => row[`${name}.${k}`]), mode: "lines+markers", line: {color: colour(place), width: 2}, name: row.policy, hovertemplate: "k = %{x}: %{y:.4g}<extra>%{fullData.name}</extra>"};
  }), layout: {xaxis: {title: "k samples of a prompt", type: "log", tickvals: all, ticktext: all.map(String)}, yaxis: {title}}};
}

function distinctShares(rows) {
  const x = rows.map(row => row.policy);
  return {traces: [["distinct_1", "words"], ["distinct_2", "pairs of words"]].map(([name, label], place) => (
    {type: "bar", x, y: rows.map(row => known(row[name]) ? 100 * row[name] : null), name: label, marker: {color: COLOURS[place]}, hovertemplate: `%{x}: %{y:.3g} % of ${label}<extra></extra>`}
  )), layout: {barmode: "group", xaxis: {type: "category"}, yaxis: {title: "% that are distinct", rangemode: "tozero"}}};
}

// null where the figures are not an evaluation's
function evaluationCharts({rows}) {
  const place = make("div", {className: "charts"});
  if (rows.some(row => known(row.win_rate)))
    place.append(chart("Win rate", () => winRates(rows), {note: `over ${rows[0].policy}, 95 % interval`}));
  for (const [name, title] of [["best_of", "Best of k"], ["pass_at", "pass@k"]])
    if (rows.some(row => ranks(row, name).length > 1))
      place.append(chart(title, () => overK(rows, name, name === "best_of" ? "reward" : "share of prompts"), {note: "unbiased, from all samples"}));
  if (rows.some(row => known(row.distinct_1))) place.append(chart("Distinct n-grams", () => distinctShares(rows)));
  return place.children.length ? place : null;
}
