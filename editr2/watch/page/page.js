"use strict";
// Asks every two seconds what is new. A server that does not answer is asked again: its address is
// the same when it comes back.

const EVERY = 2000; // ms
const at = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (k) => style(`--c${k % 9}`);
const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
const plots = new Map(); // by title
let version = "";
let strips = "";

function element(name, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...inside);
  return made;
}

function said(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3));
  return text.replace(/-/g, "−");
}

async function asked(path, have) {
  const answer = await fetch(`${path}?have=${have}`);
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}

async function look() {
  try {
    const state = await asked("state", version);
    standing(state.status);
    if (state.version !== version) {
      show(state);
      const found = await asked("strips", strips);
      if (found.version !== strips) pictures(found);
      strips = found.version;
      version = state.version;
      document.body.dataset.version = version;
    }
    problem("");
  } catch (error) {
    console.info(error.message);
    problem("The server of this page does not answer. Trying again; `editr2 watch` brings it back.");
    version = ""; // whoever answers next counts anew
  }
  setTimeout(look, EVERY);
}

function problem(text) {
  if (at("problem").textContent !== text) at("problem").textContent = text;
  at("problem").hidden = !text;
}

function standing(status) {
  if (at("standing").textContent !== status.text) at("standing").textContent = status.text;
  at("dot").dataset.kind = status.kind;
}

function show(state) {
  at("title").textContent = state.title;
  const planned = state.planned || 0;
  const share = planned ? state.done / planned : 0;
  document.title = planned ? `${Math.floor(100 * share)} % ${state.title}` : state.title;
  at("progress").hidden = !planned;
  at("bar").value = share;
  at("done").textContent = `iteration ${state.done} of ${planned}`;
  at("left").textContent = state.left ? `· ${state.left} left` : "";
  at("speed").textContent = state.speed || "";
  at("facts").replaceChildren(...state.facts.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  at("notes").replaceChildren(...state.notes.map((note) => {
    const made = element("li", { textContent: note.text });
    made.dataset.kind = note.kind;
    return made;
  }));
  curves(state.curves);
  table(state.evaluations);
  at("failures-of").hidden = !state.failures.length;
  at("failures").replaceChildren(...state.failures.map((one) =>
    element("li", {}, element("span", { textContent: one.times > 1 ? `${one.at} (${one.times} times)` : one.at }), one.why)));
}

function table(found) {
  at("evaluations-of").hidden = !found;
  if (!found) return;
  const cells = (row, kind) => row.map((text, k) => {
    const made = element(k ? kind : "th", { textContent: text });
    if (made.tagName === "TH") made.scope = kind === "th" ? "col" : "row";
    return made;
  });
  at("evaluations").replaceChildren(
    element("thead", {}, element("tr", {}, ...cells(found.head, "th"))),
    element("tbody", {}, ...found.rows.map((row) => element("tr", {}, ...cells(row, "td")))),
  );
}

// ---------------------------------------------------------------------------------------------- curves

function curves(specs) {
  at("curves-of").hidden = !specs.length;
  at("more").hidden = !specs.some((spec) => spec.small);
  const seen = new Set();
  for (const spec of specs) {
    const shape = JSON.stringify([spec.series.map((one) => [one.label, one.colour]), spec.log]);
    const known = plots.get(spec.title);
    if (!known || known.shape !== shape) {
      if (known) known.figure.remove();
      plots.set(spec.title, chart(spec, shape));
    } else {
      known.set(spec);
    }
    const place = at(spec.small ? "curves-more" : "curves");
    const figure = plots.get(spec.title).figure;
    if (figure.parentElement !== place) place.append(figure);
    seen.add(spec.title);
  }
  for (const [title, known] of plots) {
    if (!seen.has(title)) {
      known.figure.remove();
      plots.delete(title);
    }
  }
  for (const known of plots.values()) known.draw();
}

function chart(first, shape) {
  let spec = first;
  let plot = null;
  const box = element("div", { className: "plot" });
  const legend = element("div", { className: "legend" });
  const figure = element("figure", {}, element("figcaption", { textContent: spec.title }), legend, box);
  box.setAttribute("role", "img");
  const values = spec.series.map((one) => {
    const sign = element("i");
    sign.style.borderTopColor = `var(--c${one.colour % 9})`;
    sign.dataset.dash = one.dash % 4;
    const value = element("b");
    legend.append(element("span", {}, ...(spec.series.length > 1 || one.label ? [sign, one.label, " "] : []), value));
    return value;
  });
  const where = element("span");
  legend.append(where);
  const floor = () => Math.floor(Math.log10(Math.min(...spec.series.flatMap((one) => one.y.filter((y) => y > 0)), 1))) - 1;
  const lifted = (y, least) => (y === null || !spec.log ? y : y > 0 ? Math.log10(y) : least);

  function tell(index) {
    const last = (y) => y.reduce((place, value, i) => (value === null ? place : i), -1);
    spec.series.forEach((one, k) => {
      values[k].textContent = said(one.y[index ?? last(one.y)]);
    });
    where.textContent = index === null || index === undefined ? "" : `at ${spec.x[index]}`;
  }

  function data() {
    const least = floor();
    return [spec.x, ...spec.series.map((one) => one.y.map((y) => lifted(y, least)))];
  }

  function make() {
    const height = spec.small ? 110 : 190;
    const axis = {
      stroke: () => style("--soft"), font: "11px ui-sans-serif, system-ui, sans-serif",
      grid: { stroke: () => style("--rule"), width: 1 }, ticks: { show: false }, gap: 4,
    };
    plot = new uPlot({
      width: box.clientWidth || 320, height, legend: { show: false }, padding: [8, 10, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "iteration", scales: ["x", null] } },
      scales: {
        x: { time: false, range: (u, low, high) => (low < high ? [low, high] : [low - 0.5, low + 0.5]) },
        y: {
          range: (u, low, high) => {
            if (low === null) return [0, 1];
            const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
            return [low - room, high + room];
          },
        },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 24, space: 46,
          filter: (u, splits) => splits.map((v) => (v === Math.round(v) ? v : null)),
          values: (u, splits) => splits.map((v) => (v === null ? "" : String(v))) },
        { ...axis, size: 48, space: 28,
          filter: spec.log ? (u, splits) => splits.map((v) => (v === Math.round(v) ? v : null)) : undefined,
          values: (u, splits) => splits.map((v) => (v === null ? "" : !spec.log ? said(v) : v === floor() ? "0" : `1e${v}`.replace("-", "−"))) },
      ],
      series: [{}, ...spec.series.map((one) => ({
        stroke: () => colour(one.colour), width: 2, dash: DASHES[one.dash % 4],
        points: { show: spec.x.length < 8, size: 6, fill: () => colour(one.colour) },
      }))],
      hooks: { setCursor: [(u) => tell(u.cursor.left >= 0 ? u.cursor.idx : null)] },
    }, data(), box);
    new ResizeObserver(() => {
      if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height });
    }).observe(box);
  }

  return {
    shape, figure,
    set(next) {
      const few = spec.x.length < 8;
      spec = next;
      if (plot && few !== spec.x.length < 8) {
        plot.destroy();
        plot = null;
      }
    },
    // In a part of the page that is not open there is nothing to be drawn on.
    draw() {
      if (!box.clientWidth) return;
      if (plot) plot.setData(data());
      else make();
      tell(null);
      const words = spec.series.map((one, k) => `${one.label || spec.title} ${values[k].textContent}`);
      box.setAttribute("aria-label", `${spec.title}, newest: ${words.join(", ")}`);
    },
    redraw() {
      if (plot) plot.redraw();
    },
  };
}

at("more").addEventListener("toggle", () => plots.forEach((known) => known.draw()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((known) => known.redraw()));

// ---------------------------------------------------------------------------------------------- images

function pictures(found) {
  at("strips-of").hidden = !found.sessions.length;
  at("strips-title").textContent = found.title || "";
  const count = found.sessions.length;
  at("strips-how").textContent = count < found.of ? `${count} of ${found.of} sessions, those that failed or have the least reward first` : "";
  at("strips").replaceChildren(...found.sessions.map(session));
}

function session(one) {
  const image = (src, alt, kind = "") => element("img", { src, alt, className: `${one.small ? "small " : ""}${kind}` });
  const source = element("div", { className: "turn" });
  if (one.source) source.append(image(one.source, "The source"));
  source.append("source");
  const turns = one.turns.map((turn, k) => {
    const made = element("div", { className: "turn" });
    if (turn.image) made.append(image(turn.image, `After turn ${k + 1}: ${turn.instruction}`));
    made.append(element("div", { textContent: turn.instruction }));
    const scores = Object.entries(turn.scores);
    if (turn.reward !== null) scores.unshift(["reward", turn.reward]);
    made.append(element("div", { className: "scores" }, ...scores.map(([name, value]) =>
      element("span", { textContent: `${name} ${value.toFixed(2)}` }))));
    if (turn.reason) made.append(element("div", { className: "why", textContent: turn.reason }));
    if (turn.asked) made.append(element("div", { className: "scores" }, image(turn.asked, "What was asked for", "asked"), "asked for"));
    made.title = Object.entries(turn.whys).map(([name, why]) => `${name}: ${why}`).join("\n");
    return made;
  });
  const name = one.mode ? `${one.id} · ${one.mode}` : one.id;
  return element("div", { className: "session" }, element("h3", { textContent: name }),
    element("div", { className: "turns" }, source, ...turns));
}

look();
