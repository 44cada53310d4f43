"use strict";
// Elements, and what the page carries: gzip in base64, unpacked on demand.

const at = id => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else if (name === "style") Object.assign(element.style, value);
    else element[name] = value;
  }
  element.append(...children.filter(child => child !== null && child !== undefined)); // strings become text, never markup
  return element;
}

async function unpacked(id) {
  const characters = atob(at(`data-${id}`).textContent);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  const {readable, writable} = new DecompressionStream("gzip");
  const writer = writable.getWriter();
  writer.write(bytes);
  writer.close();
  return new Response(readable).text();
}

let report = null; // {title, made, every_s, runs, sets}, see page.py

const loaded = new Map();

// the samples of set `number`, with those of each prompt together
function samplesOf(number) {
  if (!loaded.has(number)) loaded.set(number, unpacked(number).then(text => grouped(JSON.parse(text))));
  return loaded.get(number);
}

function grouped(columns) {
  columns.rows = columns.prompts.map(() => []);
  columns.prompt.forEach((prompt, row) => columns.rows[prompt].push(row));
  columns.place = new Map(columns.prompts.map((text, prompt) => [text, prompt]));
  return columns;
}

const known = value => value !== null && value !== undefined && Number.isFinite(value);

function number(value, digits = 3) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2);
  return value.toFixed(size >= 100 ? 1 : digits);
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 90) return `${number(seconds, seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const many = () => report.runs.length > 1;
const runName = run => report.runs[run].name;
const isOfSeveralRuns = series => new Set(series.sets.map(own => own.run)).size > 1;
const setName = own => many() ? `${runName(own.run)} · ${own.name}` : own.name;

// ---- series: sets of one name, over all runs ----

function seriesRank(name, sets) {
  if (sets.some(own => own.source.includes(".json."))) return 0;
  const order = ["validation", "iterations", "rollouts"].findIndex(kind => name.startsWith(kind));
  return order < 0 ? 4 : order + 1;
}

// [{name, sets: [{number, ...}]}], the most telling first
function allSeries() {
  const found = new Map();
  report.sets.forEach((own, place) => {
    own.number = place;
    if (!found.has(own.series)) found.set(own.series, []);
    found.get(own.series).push(own);
  });
  return [...found].map(([name, sets]) => ({name, sets, rank: seriesRank(name, sets)})).sort((a, b) => a.rank - b.rank);
}

const ofRun = (series, run) => series.sets.filter(own => own.run === run);

// ---- what survives a reload ----

const memory = `report ${location.pathname}`;

function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(memory)) ?? {};
  } catch {
    return {};
  }
}

function remember(state) {
  try {
    sessionStorage.setItem(memory, JSON.stringify({...remembered(), ...state}));
  } catch { /* storage is full or forbidden: the page works without */ }
}
