/* Images in large, and the table of sessions. Texts are put in as text, never as markup. */
(() => {
  "use strict";

  /* ---- images: a click or Enter shows one in large; arrows go on to the session's others */
  const dialog = document.querySelector("dialog.zoom");
  if (dialog) {
    const image = dialog.querySelector("img");
    const caption = dialog.querySelector("p");
    let series = [], at = 0, opener = null;
    const show = (to) => {
      at = (to + series.length) % series.length;
      const from = series[at].querySelector("img");
      image.src = from.src;
      image.alt = from.alt;
      image.className = from.classList.contains("pixelated") ? "pixelated" : "";
      caption.textContent = `${from.alt} (${at + 1} of ${series.length})`;
      const grow = () => {
        const room = Math.min(innerWidth * 0.92 / image.naturalWidth, innerHeight * 0.78 / image.naturalHeight);
        const times = image.className ? Math.max(1, Math.floor(room)) : Math.min(room, 3);
        image.style.width = `${Math.round(image.naturalWidth * Math.min(times, room > 1 ? times : room))}px`;
      };
      image.complete ? grow() : (image.onload = grow);
    };
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button.picture");
      if (!button) return;
      const around = button.closest(".session, .film, .through, main");
      series = [...around.querySelectorAll("button.picture")];
      opener = button;
      show(series.indexOf(button));
      dialog.showModal();
    });
    dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(at + step);
    });
    dialog.addEventListener("click", (event) => {
      const step = event.target.dataset.step;
      if (step) show(at + Number(step));
      else dialog.close();
    });
    dialog.addEventListener("close", () => { image.removeAttribute("src"); if (opener) opener.focus(); });
  }

  /* ---- the table of sessions */
  const table = document.querySelector("table.sessions");
  if (!table) return;
  const data = JSON.parse(document.getElementById("sessions-data").textContent);
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const words = data.map((one) => [
    one.id,
    ...one.turns.map((turn) => turn.instruction),
    ...one.passes.flatMap((pass) => pass.turns.flatMap((turn) => [turn.problem || "", ...turn.whys.map((why) => why[1])])),
  ].join(" ").toLowerCase());
  const count = document.querySelector("#sessions-count");
  const form = document.querySelector("form.filters");
  form.hidden = false;

  const make = (tag, text, attributes = {}, children = []) => {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  const shut = (row) => {
    const button = row.querySelector("button.open");
    if (button.getAttribute("aria-expanded") !== "true") return;
    button.setAttribute("aria-expanded", "false");
    row.nextElementSibling.remove();
  };

  const filter = () => {
    const wanted = new FormData(form);
    const text = String(wanted.get("text")).trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const chosen = ["change", "mode", "task"].every((name) => {
        const value = wanted.get(name);
        return !value || (row.dataset[name] || "").split("|").includes(value);
      });
      const problem = !wanted.get("problem") || row.dataset.problem;
      const found = !text || words[row.dataset.place].includes(text);
      row.hidden = !(chosen && problem && found);
      if (row.hidden) shut(row);
      shown += !row.hidden;
    }
    count.textContent = shown === rows.length ? `${shown} sessions` : `${shown} of ${rows.length} sessions`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.forEach(shut);
      const key = (row) => {
        const value = row.cells[column].dataset.value;
        return value === undefined ? row.cells[column].textContent.trim() : value === "" ? null : Number(value);
      };
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null); /* what is missing comes last */
        const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
        return up ? order : -order;
      };
      rows.sort(compare).forEach((row) => body.append(row));
    });
  });

  const picture = (src, alt, small) => {
    const image = make("img", null, { src, alt, class: small ? "pixelated" : "", style: `width:${small ? 96 : 128}px` });
    return make("button", null, { type: "button", class: "picture", title: "show in large" }, [image]);
  };

  const film = (of) => {
    const grid = make("div", null, { class: "film" });
    const line = (name, cells) =>
      grid.append(make("div", null, { class: "row" }, [make("p", name, { class: "tag" }), ...cells]));
    const small = of.small;
    const step = (...children) => make("div", null, { class: "step" }, children);
    const beside = (cells, first) => (of.source ? [first, ...cells] : cells);
    const asked = of.turns.map((turn, t) => {
      const cell = step(make("p", `${t + 1} ${turn.instruction}`, { dir: "auto" }));
      if (turn.task) cell.append(make("p", turn.task, { class: "note" }));
      return cell;
    });
    line("", beside(asked, step(make("p", "source"))));
    if (of.source) {
      const wanted = of.turns.map((turn, t) => of.expected[t]
        ? step(picture(of.expected[t], `asked for after turn ${t + 1}: ${turn.instruction}`, small)) : step());
      line(of.expected.length ? "asked for" : "", [step(picture(of.source, `source image of session ${of.id}`, small)), ...wanted]);
    }
    for (const pass of of.passes) {
      const cells = pass.turns.map((turn, t) => {
        const cell = step();
        if (turn.image) cell.append(picture(turn.image, `${pass.name}, after turn ${t + 1}: ${of.turns[t].instruction}`, small));
        cell.append(make("p", turn.said, { class: "numbers" }));
        for (const [name, why] of turn.whys) cell.append(make("p", `${name}: ${why}`, { class: "note", dir: "auto" }));
        if (turn.problem) cell.append(make("p", turn.problem, { class: "masked" }));
        return cell;
      });
      line(pass.name, beside(cells, step()));
    }
    return grid;
  };

  body.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (!button) return;
    const row = button.closest("tr");
    if (button.getAttribute("aria-expanded") === "true") return shut(row);
    button.setAttribute("aria-expanded", "true");
    const cell = make("td", null, { colspan: row.cells.length }, [film(data[row.dataset.place])]);
    row.after(make("tr", null, { class: "opened" }, [cell]));
  });
  filter();
})();
