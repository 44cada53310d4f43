// Tables of figures, configuration and provenance.

function figuresTable({title, rows}) {
  const names = [...new Set(rows.flatMap(Object.keys))];
  const text = value => value === null || value === undefined ? "–" : typeof value === "number" ? number(value)
    : Array.isArray(value) ? value.map(text).join(" to ") : String(value);
  return make("figure", {className: "card wide"}, make("figcaption", {}, make("b", {}, title)),
    make("div", {className: "scroll"}, make("table", {},
      make("thead", {}, make("tr", {}, ...names.map(name => make("th", {}, name.replaceAll("_", " "))))),
      make("tbody", {}, ...rows.map(row => make("tr", {}, ...names.map(name => make("td", {className: typeof row[name] === "string" ? "word" : ""}, text(row[name])))))))));
}

// one table a title, a column a run: {title, keys: Map(key → [value of each run])}
function sideBySide(kind) {
  const found = new Map();
  report.runs.forEach((run, place) => run[kind].forEach(({title, values}) => {
    if (!found.has(title)) found.set(title, new Map());
    for (const [key, value] of Object.entries(values)) {
      const keys = found.get(title);
      if (!keys.has(key)) keys.set(key, report.runs.map(() => undefined));
      keys.get(key)[place] = value;
    }
  }));
  return [...found].map(([title, keys]) => ({title, keys}));
}

function drawSetup() {
  const query = at("setup-query").value.toLowerCase(), onlyDifferent = at("differences").checked, place = at("setup-tables");
  const open = new Set([...place.querySelectorAll("details[open]")].map(own => own.dataset.title));
  place.replaceChildren();
  for (const [kind, name] of [["provenance", "Provenance"], ["configs", "Configuration"]]) {
    const tables = sideBySide(kind);
    place.append(make("h2", {}, name));
    if (!tables.length) place.append(make("p", {className: "empty"}, kind === "configs" ? "No stage left its configuration here." : "No stage left a record of what it was made with here."));
    for (const {title, keys} of tables) {
      const rows = [...keys].filter(([key, values]) => {
        const differs = values.some(value => value !== values[0]);
        return (!onlyDifferent || differs) && `${title} ${key} ${values.join(" ")}`.toLowerCase().includes(query);
      });
      if (!rows.length) continue;
      const shown = value => value === undefined ? "–" : value === null ? "null" : String(value);
      place.append(make("details", {className: "group card", open: query !== "" || onlyDifferent || open.has(name + title), "data-title": name + title},
        make("summary", {}, title, make("span", {className: "hint"}, ` ${rows.length} ${rows.length === 1 ? "key" : "keys"}`)),
        make("div", {className: "scroll"}, make("table", {className: "keys"},
          many() ? make("thead", {}, make("tr", {}, make("th", {}, "key"), ...report.runs.map(run => make("th", {}, run.name)))) : null,
          make("tbody", {}, ...rows.map(([key, values]) => make("tr", {className: values.some(value => value !== values[0]) ? "differs" : ""},
            make("td", {className: "word"}, key), ...values.map(value => make("td", {className: "word"}, shown(value))))))))));
    }
  }
}

// ---- what a run came to ----

function tile(label, value, more = "", kind = "") {
  return make("div", {className: `tile ${kind}`}, make("span", {className: "label"}, label), make("b", {}, value), make("span", {className: "hint"}, more));
}

function drawTiles(series) {
  report.runs.forEach((run, place) => {
    const mine = series.find(own => ofRun(own, place).some(hasRewards));
    const sets = mine ? ofRun(mine, place).filter(hasRewards) : [], first = sets[0], last = sets.at(-1);
    const row = make("div", {className: "tiles", style: {borderColor: many() ? colour(place) : "transparent"}});
    if (many()) row.append(make("h3", {}, run.name));
    if (first && first !== last) {
      const change = last.mean - first.mean, moved = first.std ? `${change >= 0 ? "+" : "−"}${number(Math.abs(change / first.std), 2)} standard deviations` : "";
      row.append(tile("Mean reward", `${number(first.mean)} → ${number(last.mean)}`, `${moved} · ${mine.name}`, change > 0 ? "good" : change < 0 ? "bad" : ""));
    } else if (first) row.append(tile("Mean reward", number(first.mean), `± ${number(first.standard_error)} · ${first.name}`));
    const top = first?.best_of.at(-1);
    if (top && top[0] > 1) row.append(tile(`Best of ${top[0]}`, number(top[2]), `of ${first.name}, KL ≤ ${number(top[1], 2)} nats`));
    if (known(last?.kl)) row.append(tile("KL to the start", `${number(last.kl)}`, `nats a response · ${last.name}`));
    const all = report.sets.filter(own => own.run === place);
    if (all.length) row.append(tile("Samples", all.reduce((sum, own) => sum + own.samples, 0).toLocaleString("en"), `in ${all.length} ${all.length === 1 ? "set" : "sets"}`));
    const seconds = run.times.flatMap(own => Object.values(own.stages).flat()).reduce((a, b) => a + b, 0);
    if (seconds) row.append(tile("Time in stages", duration(seconds), run.times.map(own => `${own.labels.length} ${own.unit}s`).join(", ")));
    if (run.writers.length) row.append(tile("Going on", "running", run.writers[0], "live"));
    at("tiles").append(row);
    for (const fault of run.faults) at("tiles").append(make("p", {className: "fault"}, `left out: ${fault}`));
  });
}
