// The curves, drawn by uPlot, in the colours of the site's light or dark scheme.
import uPlot from "./vendor/uplot/uPlot.esm.js";

// on a phone the curve shares the screen with the fields below it
const HEIGHT = 320;
const HEIGHT_OF_NARROW = 200;
const NARROW = 500;
const shortNumber = (value) => (value == null ? "" : String(Number(value.toPrecision(4))));

export class Chart {
  constructor(place, colours) {
    this.place = place;
    this.colours = colours;
    this.drawn = null;
    this.kind = "";
    new ResizeObserver(() => this.drawn?.setSize(this.#size())).observe(place);
    // the scheme of the site is an attribute of its body, which follows the reader's system
    new MutationObserver(() => this.drawn?.redraw()).observe(document.body, {
      attributes: true,
      attributeFilter: ["data-md-color-scheme"],
    });
  }

  // `steps` and the curves' rates as the package gives them, all rates at the same steps
  draw(steps, curves) {
    const labels = curves.map(({ schedule, label, dashed }) => {
      const name = dashed ? label : label.split("(")[0];
      return `${schedule + 1} ${name}`;
    });
    const data = [steps, ...curves.map(({ rates }) => rates)];
    const kind = JSON.stringify(labels);
    if (this.drawn && kind === this.kind) {
      this.drawn.setData(data);
      return;
    }
    this.kind = kind;
    this.drawn?.destroy();
    this.drawn = null;
    if (!curves.length) return;
    const series = curves.map(({ schedule, dashed }, i) => ({
      label: labels[i],
      stroke: () => this.colour(schedule),
      width: 2,
      dash: dashed ? [6, 4] : undefined,
      value: (_, rate) => shortNumber(rate),
    }));
    const axis = { stroke: () => this.#text(), grid: { stroke: "#8884", width: 1 }, ticks: { stroke: "#8884" } };
    const options = {
      ...this.#size(),
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.05 : 1] } },
      series: [{ label: "update k" }, ...series],
      axes: [axis, { ...axis, size: 80, values: (_, rates) => rates.map(shortNumber) }],
    };
    this.drawn = new uPlot(options, data, this.place);
  }

  // the colour of a schedule; the one that is black is the text's, which is light in the dark
  colour(schedule) {
    const colour = this.colours[schedule % this.colours.length];
    return colour === "#000000" ? this.#text() : colour;
  }

  #text() {
    return getComputedStyle(this.place).color;
  }

  #size() {
    const width = Math.max(240, this.place.clientWidth);
    return { width, height: width < NARROW ? HEIGHT_OF_NARROW : HEIGHT };
  }
}
