// What the package answers, as tables, sentences and code.
import { element } from "./dom.js";

// a row for each update, a column for each schedule
export function table(answer, colour) {
  const heads = answer.schedules.map((schedule, i) =>
    element("th", { scope: "col", title: schedule.text }, dot(colour(i)), `${i + 1} ${schedule.name}`),
  );
  const rows = answer.rows.map(({ label, cells }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, label),
      ...cells.map((cell) => element("td", {}, cell)),
    ),
  );
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "rate, share of the peak"), ...heads)),
    element("tbody", {}, ...rows),
  );
}

export function words(answer, colour) {
  return answer.schedules.flatMap((schedule, i) => {
    const [first, ...lines] = schedule.problem ? [schedule.text, schedule.problem] : schedule.words;
    const items = lines.map((line) => element("li", {}, line));
    return [element("p", {}, dot(colour(i)), element("code", {}, first)), element("ul", {}, ...items)];
  });
}

export function snippets(schedule) {
  return Object.entries(schedule.snippets ?? {}).map(([title, code]) => {
    const copy = element("button", { type: "button" }, "copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(code);
      copy.textContent = "copied";
    });
    const lines = element("pre", { tabindex: "0" }, element("code", {}, code));
    return element("section", { "aria-label": title }, element("h3", {}, title), copy, lines);
  });
}

export function dot(colour) {
  return element("span", { class: "explore-dot", style: `background: ${colour}`, "aria-hidden": "true" });
}
