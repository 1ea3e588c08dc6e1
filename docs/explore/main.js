// The page docs/explore.md: keeps what is asked for, asks the package, shows its answer. The state is what the
// address says, in the package's own words: no rate, share or sentence is computed here.
import { Chart } from "./chart.js";
import { element } from "./dom.js";
import { ScheduleForm } from "./form.js";
import { Python } from "./python.js";
import { dot, snippets, table, words } from "./results.js";

// browsers refuse more than some hundred changes of the address in half a minute
const ADDRESS_DELAY = 300;

const part = (name) => document.querySelector(`#explore [data-part="${name}"]`);
const state = { schedules: [], selected: 0, readings: [], fields: {} };
let about, answer, chart, form, timer;

const python = new Python(begin, (message) => {
  part("status").hidden = false;
  part("status").textContent = `Python did not start in this browser: ${message}`;
});

function begin(described) {
  about = described;
  chart = new Chart(part("chart"), about.colours);
  form = new ScheduleForm(part("form"), about, () => {
    state.schedules[state.selected] = form.call;
    state.fields.peak = form.peak.input.value;
    ask();
  });
  buildReadings();
  buildRun();
  buildUpdates();
  part("body").hidden = false;
  window.addEventListener("hashchange", restore);
  restore();
}

// what the address asks for
function restore() {
  python.ask(location.hash, (shown) => {
    state.schedules = shown.schedules.map(({ text }) => text);
    state.selected = Math.min(state.selected, state.schedules.length - 1);
    state.readings = shown.readings;
    state.fields = shown.fields;
    for (const [name, text] of Object.entries(state.fields)) {
      const input = document.getElementById(`explore-${name}`);
      if (input) input.value = text;
    }
    for (const box of part("readings").querySelectorAll("input")) box.checked = state.readings.includes(box.value);
    render(shown, true);
  });
}

// what the form, the tabs and the boxes ask for
function ask(all = false) {
  const pairs = state.schedules.map((text) => ["schedule", text]);
  pairs.push(...state.readings.map((name) => ["reading", name]), ...Object.entries(state.fields));
  python.ask(new URLSearchParams(pairs).toString(), (shown) => render(shown, all));
}

function render(shown, all) {
  answer = shown;
  part("status").hidden = true;
  const schedule = answer.schedules[state.selected];
  form.show(schedule, answer, all);
  chart.draw(answer.steps, answer.curves);
  part("tabs").replaceChildren(...tabs());
  part("table").replaceChildren(table(answer, (i) => chart.colour(i)));
  part("words").replaceChildren(...words(answer, (i) => chart.colour(i)));
  part("snippets").replaceChildren(...snippets(schedule));
  renderReadings(schedule);
  renderRun();
  problem("updates", answer.problems.updates);
  const unknown = Object.keys(answer.problems).filter((name) => !["peak", "schedules", "updates", "run"].includes(name));
  if (unknown.length) {
    part("status").hidden = false;
    part("status").textContent = unknown.map((name) => answer.problems[name]).join("; ");
  }
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", `#${answer.fragment}`), all ? 0 : ADDRESS_DELAY);
  part("body").dataset.fragment = answer.fragment;
}

// the schedules to choose from, and what can be done with the one that is chosen
function tabs() {
  const buttons = answer.schedules.map((schedule, i) =>
    action([dot(chart.colour(i)), `${i + 1} ${schedule.name || schedule.text}`], () => select(i), {
      "aria-pressed": String(i === state.selected),
      title: schedule.text,
    }),
  );
  const { text, half, double } = answer.schedules[state.selected];
  const full = state.schedules.length >= about.most;
  const more = [
    action(["compare"], () => add(text), { disabled: full, title: "another schedule, first a copy of this one" }),
    action(["half as long"], () => add(half), { disabled: full || !half, title: half }),
    action(["twice as long"], () => add(double), { disabled: full || !double, title: double }),
    action(["remove"], remove, { disabled: state.schedules.length === 1, title: `remove ${text}` }),
  ];
  return [...buttons, element("span", { class: "explore-gap" }), ...more];
}

function action(children, onclick, attributes) {
  const name = children.at(-1);
  // the tabs are made anew: what had the focus gets it back
  const focused = document.activeElement?.dataset?.action === name;
  const button = element("button", { type: "button", "data-action": name, onclick, ...attributes }, ...children);
  if (focused) queueMicrotask(() => button.focus());
  return button;
}

function select(i) {
  state.selected = i;
  render(answer, true);
}

function add(text) {
  state.schedules.push(text);
  state.selected = state.schedules.length - 1;
  ask(true);
}

function remove() {
  state.schedules.splice(state.selected, 1);
  state.selected = Math.max(0, state.selected - 1);
  ask(true);
}

// other readings of a cosine with warm-up

function buildReadings() {
  const boxes = Object.entries(about.readings).map(([name, label]) => {
    const box = element("input", { type: "checkbox", id: `explore-reading-${name}`, value: name });
    box.addEventListener("change", () => {
      state.readings = [...part("readings").querySelectorAll("input:checked")].map(({ value }) => value);
      ask();
    });
    const text = element("small", { class: "explore-help", "data-reading": name });
    return element("p", {}, element("label", {}, box, ` also draw: ${label}`), " ", text);
  });
  part("readings").append(...boxes);
}

function renderReadings(schedule) {
  const sentences = schedule.readings ?? {};
  for (const text of part("readings").querySelectorAll("[data-reading]")) {
    text.textContent = sentences[text.dataset.reading] ?? "";
  }
  part("readings").hidden = !Object.values(sentences).some(Boolean);
}

// plain fields: the updates to tell the rates of, and the size of the run

function plainField(name, help) {
  const input = element("input", { id: `explore-${name}`, spellcheck: "false", "aria-describedby": `explore-${name}-help` });
  input.addEventListener("input", () => {
    state.fields[name] = input.value;
    ask();
  });
  const small = element("small", { class: "explore-help", id: `explore-${name}-help` }, help);
  return element("div", { class: "explore-field" }, element("label", { for: input.id }, name), input, small);
}

function buildUpdates() {
  const alert = element("p", { class: "explore-problem", role: "alert", "data-problem": "updates", hidden: true });
  part("table").before(plainField("updates", "whose rates the table tells, counted from 0, with commas between them"), alert);
}

function buildRun() {
  part("run").addEventListener("submit", (event) => event.preventDefault());
  const fields = Object.entries(about.run).map(([name, help]) => plainField(name, help));
  const result = element("output", { "data-part": "updates-of-run" });
  const use = element("button", { type: "button", "data-part": "use" }, "use as total_steps");
  use.addEventListener("click", () => {
    form.inputs.get("total_steps").input.value = answer.total_steps;
    form.onChange();
  });
  const alert = element("p", { class: "explore-problem", role: "alert", "data-problem": "run", hidden: true });
  part("run").append(...fields, alert, element("p", {}, result, " ", use));
}

function renderRun() {
  const known = answer.total_steps != null;
  part("updates-of-run").textContent = known ? `${answer.total_steps} updates` : "";
  part("use").disabled = !known || !form.inputs.has("total_steps");
  problem("run", answer.problems.run);
}

function problem(name, message) {
  const place = document.querySelector(`#explore [data-problem="${name}"]`);
  place.textContent = message ?? "";
  place.hidden = !message;
}
