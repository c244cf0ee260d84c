const lines = text => text.split("\n").map(line => line.trim()).filter(Boolean);
const LISTS = new Set(["unchanged_objects", "available_objects", "all_objects"]);

// What a control says, in the form of the file; undefined where it is empty.
function value(control) {
  const name = control.dataset.field, text = control.value.trim();
  if (LISTS.has(name)) return lines(control.value);
  if (text === "") return undefined;
  return name === "bg_consistency" ? text === "true" : text;
}

function isChanged(control) {
  return LISTS.has(control.dataset.field)
    ? lines(control.value).join("\n") !== lines(control.defaultValue).join("\n")
    : control.value.trim() !== control.dataset.was.trim();
}

function things(box) {
  const known = new Map(JSON.parse(box.dataset.objects).map(row => [row.name, row]));
  const rows = [];
  for (const area of box.querySelectorAll("textarea"))
    for (const name of lines(area.value))
      rows.push({name, foreground: area.dataset.ground === "front", seen: known.has(name) ? known.get(name).seen : true});
  return rows;
}

function corrections() {
  const rows = [];
  for (const section of document.querySelectorAll("section")) {
    const session = section.dataset.session, box = section.querySelector(".things");
    let touched = false;
    for (const area of box.querySelectorAll("textarea")) {
      const changed = lines(area.value).join("\n") !== lines(area.defaultValue).join("\n");
      area.classList.toggle("changed", changed);
      touched ||= changed;
    }
    if (touched) rows.push({session, source_objects: things(box)});
    for (const article of section.querySelectorAll("article")) {
      const row = {session, turn: Number(article.dataset.turn), instruction: article.dataset.instruction};
      let some = false;
      for (const control of article.querySelectorAll("[data-field]")) {
        const changed = isChanged(control), said = value(control);
        control.classList.toggle("changed", changed);
        if (changed && said !== undefined) { row[control.dataset.field] = said; some = true; }
      }
      if (some) rows.push(row);
    }
  }
  return rows;
}

function form(article) {
  const task = article.querySelector('[data-field="task"]').value;
  article.querySelector(".form").textContent = (FORMS[task] || []).join("   or   ");
}

let saved = "";
function update() {
  const rows = corrections(), count = rows.length;
  document.getElementById("count").textContent = count === 0 ? "No corrections" : count === 1 ? "1 correction" : count + " corrections";
  document.getElementById("save").disabled = count === 0;
  return rows.map(row => JSON.stringify(row) + "\n").join("");
}

document.addEventListener("input", event => {
  const article = event.target.closest("article");
  if (article) form(article);
  update();
});
document.getElementById("save").addEventListener("click", () => {
  saved = update();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([saved], {type: "application/jsonl"}));
  link.download = "corrections.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
document.getElementById("only").addEventListener("change", event => {
  for (const section of document.querySelectorAll("section"))
    section.hidden = event.target.checked && !section.classList.contains("lacks");
});
window.addEventListener("beforeunload", event => { if (update() !== saved) event.preventDefault(); });
document.querySelectorAll("article").forEach(form);
update();
