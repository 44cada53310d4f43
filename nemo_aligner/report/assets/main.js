// Starts the page.

const VIEWS = ["overview", "samples", "training", "setup"];

// the view that the address names: page.html#/samples
const asked = () => VIEWS.find(name => location.hash === `#/${name}`);

function view(name) {
  for (const own of VIEWS) {
    at(own).hidden = own !== name;
    document.querySelector(`[data-view=${own}]`).setAttribute("aria-selected", String(own === name));
  }
  if (asked() !== name) history.replaceState(null, "", `#/${name}`);
  document.body.dataset.view = name;
  if (name === "samples") show();
  dispatchEvent(new Event("resize")); // charts drawn while hidden take their width now
}

function goneOn() {
  if (many()) at("title").replaceChildren(...report.runs.map((run, place) => make("span", {className: "run", style: {color: colour(place)}}, "● ", make("b", {}, run.name))));
  const live = report.runs.filter(run => run.writers.length).length;
  const made = new Date(report.made);
  at("status").replaceChildren(
    live ? make("span", {className: "chip live"}, live === 1 && !many() ? "running" : `${live} running`) : "",
    `${many() ? `${report.runs.length} runs · ` : ""}as of ${made.toLocaleString("en-GB")}`,
    report.every_s ? ` · loads itself again every ${report.every_s} s` : "");
  if (!report.every_s) return;
  setInterval(() => {
    const typing = document.activeElement?.matches("input, select") || String(getSelection() ?? "") !== "";
    if (document.hidden || typing) return; // not under the hands of a reader
    remember({scroll: scrollY});
    location.reload();
  }, report.every_s * 1000);
}

function startSets(series, kept) {
  const main = series.find(own => own.sets.some(hasRewards)) ?? series[0];
  const run = main.sets[0].run, mine = ofRun(main, run), rewarded = mine.filter(hasRewards);
  const last = rewarded.at(-1) ?? mine.at(-1), first = rewarded[0] ?? mine[0];
  const other = many() ? main.sets.filter(own => own.run !== run && hasRewards(own)).at(-1) : null;
  choice.after = (other ?? last).number;
  const before = other ? last : first;
  if (before.number !== choice.after && before.samples + report.sets[choice.after].samples <= 20000) choice.before = before.number;
  const old = kept.choice;
  if (old && (old.before === null || old.before < report.sets.length) && old.after < report.sets.length) Object.assign(choice, old);
  for (const order of kept.open ?? []) table.open.set(order, 0);
}

async function start() {
  report = JSON.parse(await unpacked("head"));
  const kept = remembered(), series = allSeries();
  goneOn();
  drawTiles(series);
  const told = series.filter(own => own.sets.some(hasRewards) || own.sets.some(one => one.tokens));
  at("series").append(...told.map((own, place) => make("option", {value: place}, own.name)));
  const choose = () => {
    const own = told[Number(at("series").value)];
    const parts = own.sets.some(one => one.samples < one.of);
    at("series-note").textContent = `${own.sets.length} ${own.sets.length === 1 ? "set" : "sets"}, ${own.sets[0].prompts} prompts${parts ? ", of which the page has a part" : ""}`;
    drawSeries(own);
    remember({series: own.name});
  };
  at("series").addEventListener("change", choose);
  if (told.length) {
    at("series").value = Math.max(0, told.findIndex(own => own.name === kept.series));
    choose();
  } else at("series-bar").hidden = true;
  for (const run of report.runs) for (const own of run.tables) {
    const titled = {...own, title: many() ? `${run.name} · ${own.title}` : own.title};
    at("figure-tables").append(...[figuresTable(titled), evaluationCharts(own)].filter(Boolean));
  }

  const lacks = (id, text) => at(id).replaceChildren(make("p", {className: "empty"}, text));
  drawTimes();
  drawCurves();
  let waiting;
  for (const id of ["curve-query", "smoothing", "log-scale"]) at(id).addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(id === "curve-query" ? drawCurves : redraw, 100); });
  at("differences-label").hidden = !many();
  drawSetup();
  for (const id of ["setup-query", "differences"]) at(id).addEventListener("input", drawSetup);

  if (report.sets.length) {
    startSets(series, kept);
    prepareTable();
  } else lacks("samples", "No samples with rewards or provenance are here yet.");
  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => { view(button.dataset.view); scrollTo(0, 0); });
  addEventListener("hashchange", () => view(asked() ?? VIEWS[0]));
  view(asked() ?? VIEWS[0]);
  if (report.sets.length) await changeSets();
  if (kept.scroll) scrollTo(0, kept.scroll);
  document.documentElement.dataset.ready = "yes";
}

start().catch(fault => {
  at("status").replaceChildren(make("span", {className: "fault"}, `This page could not be drawn: ${fault.message}`));
  throw fault;
});
