"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const search = document.getElementById("search");
  const rows = all(".s").map((row) => [row, `${row.dataset.in || ""} ${row.textContent}`.toLowerCase()]);

  // Search: rows without any of the words are hidden, and what holds a match is opened.
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    for (const layer of all("details.layer")) {
      const some = all(".s", layer).some((row) => !row.hidden);
      layer.hidden = !some;
      if (words.length) layer.open = some;
    }
    document.getElementById("found").textContent = words.length ? `${count} found` : "";
  };
  search.addEventListener("input", apply);
  search.form.addEventListener("submit", (event) => event.preventDefault());

  const open = (state) => all("details").forEach((details) => { details.open = state; });
  const theme = () => {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  };
  const actions = { e: () => open(true), c: () => open(false), t: theme };
  document.getElementById("expand").addEventListener("click", actions.e);
  document.getElementById("collapse").addEventListener("click", actions.c);
  document.getElementById("theme").addEventListener("click", actions.t);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search) {
      if (event.key === "Escape") { search.value = ""; apply(); search.blur(); }
    } else if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (actions[event.key]) {
      actions[event.key]();
    }
  });

  // A line of a graph shows what it reads and what reads it.
  for (const panel of all(".scroll")) {
    const lines = all("li", panel), paths = all("path", panel);
    let at = -1;
    const show = (number) => {
      at = number;
      lines.forEach((line, row) => { line.classList.toggle("at", row === at); line.classList.remove("to"); });
      for (const path of paths) {
        const a = Number(path.dataset.a), b = Number(path.dataset.b), on = a === at || b === at;
        path.classList.toggle("on", on);
        if (on) lines[a === at ? b : a].classList.add("to");
      }
    };
    lines.forEach((line, row) => line.addEventListener("pointerenter", () => { if (line.textContent) show(row); }));
    panel.addEventListener("pointerleave", () => show(-1));
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      let next = at + step;
      while (lines[next] && !lines[next].textContent) next += step;
      if (lines[next]) { show(next); lines[next].scrollIntoView({ block: "nearest", inline: "nearest" }); }
    });
  }
})();
