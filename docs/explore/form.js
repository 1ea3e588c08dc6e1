// The form of one schedule: its name, its arguments and the peak. What fields there are, and what they mean, the
// package says; here they become text inputs with sliders beside them, and the call that they spell.
import { element, marked } from "./dom.js";

export class ScheduleForm {
  constructor(place, about, onChange) {
    this.place = place;
    this.about = about;
    this.onChange = onChange;
    this.name = null;
    this.inputs = new Map();
    this.range = { total_steps: 1000, peak: 1 };
    place.addEventListener("submit", (event) => event.preventDefault());
    const options = Object.keys(about.constructors).map((name) => element("option", { value: name }, name));
    this.select = element("select", { id: "explore-name", onchange: () => this.#choose() }, ...options);
    this.summary = element("p", { class: "explore-help" });
    this.fields = element("div");
    this.peak = this.#field("peak", { help: "learning rate that the schedule's shares are of", default: "", choices: {} });
    this.problem = element("p", { class: "explore-problem", role: "alert", hidden: true });
    place.append(
      element("label", { for: "explore-name" }, "schedule"),
      this.select,
      this.summary,
      this.problem,
      this.peak.row,
      this.fields,
    );
  }

  // the call that the fields spell, as the package reads it
  get call() {
    const given = [...this.inputs].filter(([, { input }]) => input.value.trim() !== "");
    return `${this.name}(${given.map(([name, { input }]) => `${name}=${input.value.trim()}`).join(", ")})`;
  }

  // shows a schedule of the package's answer; the field that is being edited keeps its text, unless `all` is to change
  show(schedule, answer, all) {
    this.range = { total_steps: schedule.total_steps ?? this.range.total_steps, peak: answer.peak };
    if (schedule.name) {
      this.#build(schedule.name);
      for (const [name, field] of this.inputs) this.#set(field, schedule.given[name] ?? "", all);
    }
    this.#set(this.peak, answer.fields.peak, all);
    const problem = [answer.problems.peak, answer.problems.schedules, schedule.problem].filter(Boolean).join("; ");
    this.problem.textContent = problem;
    this.problem.hidden = !problem;
  }

  #set(field, text, all) {
    if (all || field.input !== document.activeElement) field.input.value = text;
    if (field.slider && (all || field.slider !== document.activeElement)) field.place();
  }

  // another constructor keeps the arguments that it takes too
  #choose() {
    const kept = Object.fromEntries([...this.inputs].map(([name, { input }]) => [name, input.value.trim()]));
    const start = { ...this.about.constructors[this.select.value].start };
    if (kept.min_lr) delete start.min_lr_ratio;
    this.#build(this.select.value);
    for (const [name, { input }] of this.inputs) input.value = kept[name] || start[name] || "";
    this.onChange();
  }

  #build(name) {
    if (name === this.name) return;
    this.name = name;
    this.select.value = name;
    const { summary, fields } = this.about.constructors[name];
    this.summary.replaceChildren(...marked(summary));
    this.inputs = new Map(fields.map((field) => [field.name, this.#field(field.name, field)]));
    this.fields.replaceChildren(...[...this.inputs.values()].map(({ row }) => row));
  }

  #field(name, { help, default: standard, choices }) {
    const id = `explore-${name}`;
    const described = `${id}-help`;
    const changed = () => this.onChange();
    let input;
    if (Object.keys(choices).length) {
      const options = Object.entries(choices).map(([text, value]) => element("option", { value }, text));
      const empty = element("option", { value: "" }, `default: ${standard}`);
      input = element("select", { id, "aria-describedby": described, onchange: changed }, empty, ...options);
    } else {
      const attributes = { id, "aria-describedby": described, placeholder: standard, spellcheck: "false" };
      input = element("input", { ...attributes, inputmode: "text", oninput: changed });
    }
    const label = element("label", { for: id }, name);
    const text = element("small", { id: described, class: "explore-help" }, ...marked(help));
    const field = { input, row: element("div", { class: "explore-field" }, label, input) };
    const range = this.about.sliders[name];
    if (range) this.#addSlider(field, name, range, standard);
    field.row.append(text);
    return field;
  }

  #addSlider(field, name, range, standard) {
    const slider = element("input", { type: "range", "aria-label": `${name}, slider` });
    // a rate up to the peak is set as a share of it
    const unit = () => (range.high === "peak" ? this.range.peak : 1);
    field.slider = slider;
    field.place = () => {
      const high = range.high === "peak" ? 1 : (this.range[range.high] ?? range.high);
      slider.min = range.log ? Math.log10(range.low) : range.low;
      slider.max = range.log ? Math.log10(high) : high;
      slider.step = range.step;
      let value = Number(field.input.value || standard) || 0;
      if (name === "warmup_steps" && value < 1) value *= this.range.total_steps;
      slider.value = range.log ? Math.log10(value || range.low) : value / unit();
    };
    slider.addEventListener("input", () => {
      const position = Number(slider.value);
      const digits = range.log || range.high === "peak" ? 2 : 9;
      field.input.value = Number((range.log ? 10 ** position : position * unit()).toPrecision(digits));
      this.onChange();
    });
    field.row.append(slider);
  }
}
