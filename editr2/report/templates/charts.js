/* The charts of a page: each figure holds its numbers as JSON, and uPlot draws them. */
(() => {
  "use strict";
  const root = document.documentElement;
  const SVG_DASH = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
  const plots = [];

  /* Colours are the style sheet's, read anew at every drawing: it may be dark by then, or paper. */
  const rgb = (hex) => {
    const full = hex.length === 4 ? hex.replace(/[0-9a-f]/gi, "$&$&") : hex;
    return [1, 3, 5].map((at) => parseInt(full.slice(at, at + 2), 16));
  };
  const ink = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const shaded = (colour, share) => {
    const [a, b] = [rgb(ink(`--c${colour}`)), rgb(ink("--card"))];
    return `rgb(${a.map((part, i) => Math.round(part * share + b[i] * (1 - share))).join(",")})`;
  };

  const said = (value) => {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3));
    return text.replace(/-/g, "−");
  };

  const draw = (figure) => {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const box = figure.querySelector(".plot");
    const named = typeof spec.x[0] === "string";
    const x = named ? spec.x.map((_, i) => i) : spec.x;
    const floor = spec.range[0];
    const lift = (y) => (y === null ? null : spec.log ? (y > 0 ? Math.log10(y) : floor) : y);

    /* What uPlot gets: per drawn line its place among the series, raw values first (behind). */
    const lines = [];
    if (spec.series.some((one) => one.kind === "area")) {
      let below = x.map(() => 0);
      const tops = spec.series.map((one) => (below = below.map((sum, i) => sum + (one.y[i] || 0))));
      tops.reverse().forEach((y, k) => lines.push({ of: spec.series.length - 1 - k, y }));
    } else {
      spec.series.forEach((one, of) => one.smooth.length && lines.push({ of, y: one.y, faint: true }));
      spec.series.forEach((one, of) =>
        lines.push({ of, y: (one.smooth.length ? one.smooth : one.y).map(lift) }));
    }

    const outputs = [...figure.querySelectorAll(".legend output")];
    const heading = figure.querySelector(".at");
    const tell = (at) => {
      const has = at !== null && at !== undefined;
      heading.textContent = has ? `${spec.axis} ${spec.x[at]}` : "";
      spec.series.forEach((one, k) => {
        let place = has ? at : -1;
        if (!has && !named) for (let i = 0; i < one.y.length; i++) if (one.y[i] !== null) place = i;
        const end = one.ends[place];
        outputs[k].textContent = place < 0 ? "" :
          said(one.y[place]) + (has && end ? ` [${said(end[0])}, ${said(end[1])}]` : "");
      });
    };

    /* Series side by side within a category (of runs beside one another, at an iteration), and the bars and dots that uPlot has not. */
    const shift = (u, k) => {
      if (!named) return spec.spans ? (k - (spec.series.length - 1) / 2) * 6 * devicePixelRatio : 0;
      const step = Math.min(18, (0.8 * u.bbox.width) / devicePixelRatio / x.length / spec.series.length);
      return (k - (spec.series.length - 1) / 2) * step * devicePixelRatio;
    };
    const marks = (u) => {
      const { ctx } = u;
      const px = devicePixelRatio;
      ctx.save();
      ctx.beginPath();
      ctx.rect(u.bbox.left - 7 * px, u.bbox.top - 7 * px, u.bbox.width + 14 * px, u.bbox.height + 14 * px);
      ctx.clip();
      spec.series.forEach((one, k) => {
        const dotted = one.kind === "dot" || one.kind === "hollow";
        if (!dotted && !one.ends.length) return;
        ctx.strokeStyle = shaded(one.colour, one.shade);
        one.y.forEach((value, i) => {
          if (value === null) return;
          const at = u.valToPos(x[i], "x", true) + shift(u, k);
          if (one.ends[i]) {
            const [low, high] = one.ends[i].map((end) => u.valToPos(end, "y", true));
            ctx.lineWidth = 1.5 * px;
            ctx.beginPath();
            ctx.moveTo(at, low);
            ctx.lineTo(at, high);
            for (const end of [low, high]) {
              ctx.moveTo(at - 3.5 * px, end);
              ctx.lineTo(at + 3.5 * px, end);
            }
            ctx.stroke();
          }
          ctx.beginPath();
          ctx.arc(at, u.valToPos(value, "y", true), (dotted ? 4.5 : 3) * px, 0, 2 * Math.PI);
          ctx.fillStyle = one.kind === "hollow" ? ink("--card") : shaded(one.colour, one.shade);
          ctx.lineWidth = 2 * px;
          ctx.fill();
          ctx.stroke();
        });
      });
      ctx.restore();
    };

    const series = lines.map(({ of, faint }) => {
      const one = spec.series[of];
      const area = one.kind === "area";
      const drawn = one.kind === "line" || area;
      const colour = () => shaded(one.colour, faint ? 0.35 * one.shade : one.shade);
      return {
        stroke: colour,
        fill: area ? colour : undefined,
        width: drawn ? (faint || area ? 1 : 2) : 0,
        dash: faint ? undefined : SVG_DASH[one.dash],
        spanGaps: spec.spans,
        paths: drawn ? undefined : () => null,
        points: {
          show: one.kind === "points" || (drawn && !area && !faint && x.length < 2),
          size: one.kind === "points" ? 5 : 7,
          fill: colour,
        },
      };
    });
    const whole = (u, at) => at.map((v) => (v === Math.round(v) ? v : null));
    const font = "11px ui-sans-serif, system-ui, sans-serif";
    const axis = {
      stroke: () => ink("--soft"), font, labelFont: font,
      grid: { stroke: () => ink("--rule"), width: 1 },
      ticks: { show: false },
    };
    const [least, most] = [Math.min(...x), Math.max(...x)];
    const ends = named ? [-0.5, x.length - 0.5] : least < most ? [least, most] : [least - 0.5, most + 0.5];
    const height = spec.small ? 110 : 200;
    const options = {
      width: box.clientWidth || 320,
      height,
      legend: { show: false },
      padding: [8, 10, 0, 0],
      cursor: {
        y: false,
        points: named ? { show: false } : { size: 7 },
        drag: { x: !named && x.length > 2, y: false },
        ...(named ? {} : { sync: { key: spec.axis, scales: ["x", null] } }),
      },
      scales: {
        x: { time: false, range: (u, low, high) => (u.zoomed ? [low, high] : ends) },
        y: { range: () => (spec.log ? [floor - 0.15, spec.range[1]] : spec.range) },
      },
      axes: [
        {
          ...axis, grid: { show: false }, size: 22, gap: 4,
          label: spec.small || !spec.axis ? undefined : spec.axis, labelSize: 16, labelGap: 0,
          space: named ? 1 : 46,
          splits: named ? () => x : undefined,
          filter: named ? undefined : whole,
          values: (u, at) => at.map((v) => (v === null ? "" : named ? spec.x[v] ?? "" : said(v))),
        },
        {
          ...axis, size: 48, gap: 4, space: spec.small ? 26 : 34,
          filter: spec.log ? whole : undefined,
          values: (u, at) => at.map((v) =>
            v === null ? "" : !spec.log ? said(v)
            : v === floor && spec.series[0].y.includes(0) ? "0" : `1e${v}`.replace("-", "−")),
        },
      ],
      series: [{}, ...series],
      hooks: {
        draw: [marks],
        setCursor: [(u) => tell(u.cursor.left >= 0 ? u.cursor.idx : null)],
        setSelect: [(u) => { u.zoomed = u.select.width > 0; }],
      },
    };
    const plot = new uPlot(options, [x, ...lines.map((line) => line.y)], box);
    plot.over.addEventListener("dblclick", () => { plot.zoomed = false; plot.setData(plot.data); });
    tell(null);
    plots.push(plot);
    new ResizeObserver(() => {
      if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height });
    }).observe(box);

    const details = figure.querySelector("details.data");
    details.addEventListener("toggle", () => {
      const place = details.querySelector("div");
      if (!place.children.length) place.append(table(spec));
    });
  };

  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  const table = (spec) => {
    const made = element("table", null);
    made.append(element("caption", spec.title, { class: "quiet" }));
    const head = element("tr", null);
    for (const name of [spec.axis || "of", ...spec.series.map((one) => one.label || spec.title)])
      head.append(element("th", name, { scope: "col" }));
    const top = element("thead", null);
    top.append(head);
    const body = element("tbody", null);
    spec.x.forEach((at, i) => {
      const row = element("tr", null);
      row.append(element("th", String(at), { scope: "row" }));
      for (const one of spec.series) {
        const end = one.ends[i];
        row.append(element("td", said(one.y[i]) + (end ? ` [${said(end[0])}, ${said(end[1])}]` : "")));
      }
      body.append(row);
    });
    made.append(top, body);
    return made;
  };

  const again = () => plots.forEach((plot) => plot.redraw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", () => { root.classList.add("paper"); again(); });
  addEventListener("afterprint", () => { root.classList.remove("paper"); again(); });
  document.querySelectorAll("figure.drawn").forEach(draw);
})();
