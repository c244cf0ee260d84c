"use strict";
// A vote that was not acknowledged stays in localStorage, and is sent again under its name until the
// server has it: after a kill of either side none is lost, and none counts twice.

const at = (id) => document.getElementById(id);
const LETTERS = "abcdefghijklmnopqrstuvwxyz";
const KEYS = [..."123456789", ...LETTERS];
const SMALL = 128; // pixels of an image that is shown in whole screen pixels
const STORED = "editr2-label " + location.pathname;

let who = new URLSearchParams(location.search).get("who") || localStorage.getItem(STORED + "who") || "";
let state = null; // what the server said last
let answers = []; // of this question: the whole's, then each principle's
let picked = []; // places of a ranking: [[output, …], …]
let joins = false; // the next output ties with the last
let since = 0;
let busy = false;

async function sent(path, body) {
  for (let wait = 250; ; wait = Math.min(2 * wait, 2000)) {
    try {
      const answer = await fetch(path, { method: "POST", body: JSON.stringify({ who, ...body }) });
      const said = await answer.json();
      if (!answer.ok) throw Object.assign(new Error(said.error), { refused: true });
      problem("");
      return said;
    } catch (error) {
      if (error.refused) throw error;
      problem(path === "vote"
        ? "The server does not answer. This vote is kept here and is sent again until it does."
        : "The server does not answer. Trying again.");
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function exchange(path, body = {}) {
  busy = true;
  document.body.dataset.busy = "1";
  try {
    show(await sent(path, body));
    if (path === "vote") localStorage.removeItem(STORED + "vote");
  } catch (error) {
    if (path === "vote") localStorage.removeItem(STORED + "vote");
    if (state) show(state);
    problem("Not accepted: " + error.message);
  } finally {
    busy = false;
    delete document.body.dataset.busy;
  }
}

function vote() {
  const [answer, ...principles] = answers;
  const body = {
    number: state.questions[0].number, answer, principles, who,
    seconds: Math.round(performance.now() - since) / 1000, name: named(),
  };
  localStorage.setItem(STORED + "vote", JSON.stringify(body));
  return exchange("vote", body);
}

function named() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((x) => x.toString(16).padStart(2, "0")).join("");
}

// ------------------------------------------------------------------------------------------- what is shown

function show(said) {
  state = said;
  answers = [];
  picked = [];
  joins = false;
  since = performance.now();
  const question = said.questions[0];
  document.title = at("title").textContent = said.title;
  at("count").textContent = `${said.done} of ${said.total}`;
  at("bar").value = said.total ? said.done / said.total : 1;
  at("who").textContent = who;
  at("name").hidden = true;
  at("question").hidden = !question;
  at("finished").hidden = !!question;
  document.body.dataset.number = question ? question.number : "";
  if (!question) {
    at("finished-what").textContent = said.total ? "All answered" : "Nothing to answer yet";
    at("finished-how").textContent = "This page goes on by itself when something new is asked.";
    at("back").hidden = !said.done;
    return;
  }
  at("instruction").textContent = question.instruction;
  at("earlier").replaceChildren(...question.earlier.map((text) => element("li", { textContent: text })));
  picture(at("source"), question.source);
  const pair = question.outputs.length === 2;
  at("outputs").className = pair ? "pair" : "";
  at("outputs").replaceChildren(...question.outputs.map((url, place) => output(question, url, place, pair)));
  for (const next of said.questions.slice(1)) {
    for (const url of [next.source, ...next.outputs, ...next.befores]) new Image().src = url;
  }
  step();
}

function output(question, url, place, pair) {
  const shownAs = pair ? ["Left", "Right"][place] : KEYS[place] || "";
  const one = element("button", { type: "button", className: "output" });
  one.append(picture(element("img", { alt: pair ? `${shownAs} output` : `Output ${shownAs}` }), url));
  const pieces = element("span", { className: "pieces" });
  if (question.befores.length) {
    pieces.append("made of", picture(element("img", { alt: "What it was made of" }), question.befores[place]));
  }
  pieces.append(element("kbd", { textContent: pair ? "←→"[place] : shownAs }), element("span", { className: "place" }));
  one.append(pieces);
  one.addEventListener("click", () => (pair ? choose(place ? [1, 0] : [0, 1]) : pick(place)));
  return one;
}

function picture(image, url) {
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
  image.onerror = () => problem("An image cannot be read; skip this one.");
  image.src = url;
  return image;
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

// The whole first, then each principle: the same keys mean which output it holds for.
function step() {
  const question = state.questions[0];
  const asked = question.principles[answers.length - 1];
  at("principle").hidden = asked === undefined;
  at("principle").replaceChildren(
    element("span", { textContent: `${answers.length} of ${question.principles.length}` }), asked || "");
  document.body.dataset.step = answers.length;
  const made = actions().map(([key, label, act, kind]) => {
    const one = element("button", { type: "button", className: kind || "" });
    one.append(element("kbd", { textContent: SIGNS[key] || key }), label);
    one.addEventListener("click", act);
    return one;
  });
  at("keys").replaceChildren(...made);
  [...at("outputs").children].forEach((one, place) => {
    const found = picked.findIndex((tied) => tied.includes(place));
    one.querySelector(".place").textContent = found < 0 ? "" : `place ${found + 1}`;
    if (found < 0) delete one.dataset.place;
    else one.dataset.place = found;
  });
}

const SIGNS = { ArrowLeft: "←", ArrowRight: "→", ArrowDown: "↓", ArrowUp: "↑", " ": "space", Backspace: "⌫", Enter: "⏎" };

// [key, what it says, what it does, how it looks]
function actions() {
  const question = state && state.questions[0];
  const back = ["Backspace", "Undo", undo, "minor"];
  if (!question) return [back];
  const skip = [" ", "Skip", () => choose("skip"), "minor"];
  if (question.outputs.length === 2) {
    const [left, right, tie, bad] = answers.length
      ? ["Only left", "Only right", "Both", "Neither"] : ["Left is better", "Right is better", "Tie", "Both bad"];
    return [
      ["ArrowLeft", left, () => choose([0, 1])], ["ArrowRight", right, () => choose([1, 0])],
      ["ArrowDown", tie, () => choose([0, 0])], ["ArrowUp", bad, () => choose("bad")], skip, back,
    ];
  }
  const some = picked.length > 0;
  return [
    ...(some ? [["=", joins ? "Ties with the last: on" : "Next ties with the last", () => { joins = !joins; step(); }],
      ["Enter", "Done: the others tie last", done, "done"]] : [["Enter", "All tie", done]]),
    ["ArrowUp", "All bad", () => choose("bad")], skip, back,
  ];
}

// ---------------------------------------------------------------------------------------- what is answered

function choose(answer) {
  if (busy) return;
  answers.push(answer);
  const question = state.questions[0];
  if ((answers.length === 1 && answer === "skip") || answers.length > question.principles.length) vote();
  else step();
}

function pick(place) {
  if (busy || picked.some((tied) => tied.includes(place))) return;
  if (joins) picked[picked.length - 1].push(place);
  else picked.push([place]);
  joins = false;
  if (picked.flat().length === state.questions[0].outputs.length) done();
  else step();
}

function done() {
  const count = state.questions[0].outputs.length;
  choose(Array.from({ length: count }, (_, place) => {
    const found = picked.findIndex((tied) => tied.includes(place));
    return found < 0 ? picked.length : found;
  }));
}

function undo() {
  if (busy) return;
  if (joins) joins = false;
  else if (picked.length) {
    picked[picked.length - 1].pop();
    if (!picked[picked.length - 1].length) picked.pop();
  } else if (answers.length) answers.pop();
  else {
    exchange("undo");
    return;
  }
  step();
}

document.addEventListener("keydown", (event) => {
  if (busy || !state || !at("name").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const found = actions().find(([key]) => key === event.key);
  const outputs = state.questions.length ? state.questions[0].outputs.length : 0;
  const place = outputs > 2 ? KEYS.indexOf(event.key) : -1;
  if (found) found[2]();
  else if (place >= 0 && place < outputs) pick(place);
  else return;
  event.preventDefault();
});

// ------------------------------------------------------------------------------------------------ beginning

at("back").addEventListener("click", undo);
at("who").addEventListener("click", () => {
  at("question").hidden = at("finished").hidden = true;
  at("name").hidden = false;
  at("person").value = who;
  at("person").focus();
});
at("name").addEventListener("submit", (event) => {
  event.preventDefault();
  who = at("person").value.trim();
  begin();
});

async function begin() {
  if (!who) {
    at("who").click();
    return;
  }
  localStorage.setItem(STORED + "who", who);
  const kept = localStorage.getItem(STORED + "vote");
  if (kept) await exchange("vote", JSON.parse(kept));
  await exchange("next");
}

setInterval(() => {
  if (!busy && state && !state.questions.length && at("name").hidden) exchange("next");
}, 1000);
begin();
