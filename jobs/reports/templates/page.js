"use strict";
(() => {
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, attributes = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...inside);
  return element;
};

// colours: as the system, light, or dark. A page in a mail or a frame may have no storage.
const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* it lasts for this page */ } };
const remembered = key => { try { return localStorage.getItem(key); } catch { return null; } };
const themes = ["light dark", "light", "dark"];
const setTheme = theme => {
  document.documentElement.style.colorScheme = theme;
  const name = theme === "light dark" ? "as the system" : theme;
  const button = document.querySelector(".theme");
  button.textContent = { "light dark": "◐", light: "☀", dark: "☾" }[theme];
  button.title = `Colours: ${name}`;
  button.setAttribute("aria-label", `Colours: ${name}`);
};
let theme = themes.includes(remembered("theme")) ? remembered("theme") : themes[0];
setTheme(theme);
document.querySelector(".theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  setTheme(theme);
  remember("theme", theme);
});

// tables that sort: by data-value if a cell has it
const valueOf = cell => {
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = parseFloat(text);
  return text !== "" && Number.isFinite(number) ? number : text.toLowerCase();
};
const compare = (a, b) => {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;  // what is no number comes last
  return a < b ? -1 : a > b ? 1 : 0;
};
const sortBy = (table, column, descending) => {
  const body = table.tBodies[0];
  const rows = [...body.rows].map(row => [valueOf(row.cells[column]), row]);
  rows.sort(([a], [b]) => typeof a !== typeof b ? compare(a, b) : (descending ? -1 : 1) * compare(a, b));
  body.append(...rows.map(([, row]) => row));
};
const makeSortable = table => all("thead th", table).forEach((head, column) => {
  const button = make("button", { type: "button", title: "sort" }, ...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") ?? (head.dataset.better === "1" ? "ascending" : "");
    all("th", table.tHead).forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order === "ascending" ? "descending" : "ascending");
    sortBy(table, column, order === "ascending");
  });
});
const prepare = root => all("table.sortable", root).forEach(makeSortable);
prepare(document);

// the order of samples
all("select.order").forEach(select => select.addEventListener("change", () => {
  const list = document.getElementById(select.dataset.list);
  const [key, sign] = { place: ["place", 1], worst: ["rank", 1], best: ["rank", -1] }[select.value];
  const value = card => card.dataset[key] === "" ? Infinity : sign * Number(card.dataset[key]);
  list.append(...[...list.children].sort((a, b) => value(a) - value(b)));
}));

// filters: a row is shown if each select that filters its table agrees
all("select.filter").forEach(select => select.addEventListener("change", () => {
  all(`[data-${select.dataset.by}]`, document.getElementById(select.dataset.list)).forEach(row => {
    row.hidden = select.value !== "" && row.dataset[select.dataset.by] !== select.value;
  });
}));

// tokens: what is under the pointer
const codes = JSON.parse(document.getElementById("codes")?.textContent ?? "null");
const tip = make("div", { className: "tip", hidden: true });
document.body.append(tip);
const showTip = (event, inside) => {
  tip.replaceChildren(...inside);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 16, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(4, event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16)}px`;
};
const patchOf = token => {
  const place = codes?.patches?.order?.[token];
  if (place === undefined) return [];
  const { side, columns, image, rows } = codes.patches;
  const scale = 64 / side, patch = make("i");
  patch.style.backgroundImage = `url(${image})`;
  patch.style.backgroundSize = `${columns * side * scale}px ${rows * side * scale}px`;
  patch.style.backgroundPosition = `${-(place % columns) * 64}px ${-Math.floor(place / columns) * 64}px`;
  return [patch];
};
const describeToken = (image, event) => {
  const values = JSON.parse(image.dataset.tokens), columns = Number(image.dataset.columns);
  const box = image.getBoundingClientRect(), rows = values.length / columns;
  const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
  const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
  const token = values[row * columns + column];
  const share = codes?.shares?.[token];
  const text = make("span", {}, make("b", {}, `token ${token}`), make("br"),
    rows > 1 ? `row ${row + 1}, column ${column + 1}` : `place ${column + 1} of ${columns}`);
  if (share !== undefined) text.append(make("br"), `${share} tokens in this evaluation`);
  showTip(event, [...patchOf(token), text]);
};
all("img[data-tokens]").forEach(image => {
  image.addEventListener("pointermove", event => describeToken(image, event));
  image.addEventListener("pointerleave", () => { tip.hidden = true; });
});
all("img.atlas").forEach(image => image.addEventListener("pointermove", event => {
  const { columns, side, rows, order } = codes.patches, box = image.getBoundingClientRect();
  const place = Math.floor((event.clientY - box.top) / box.height * rows) * columns
    + Math.floor((event.clientX - box.left) / box.width * columns);
  const token = Object.keys(order).find(code => order[code] === place);
  if (token === undefined) { tip.hidden = true; return; }
  showTip(event, [...patchOf(token), make("span", {}, make("b", {}, `code ${token}`), make("br"), `${codes.shares?.[token] ?? 0} tokens`)]);
}));
all("img.atlas").forEach(image => image.addEventListener("pointerleave", () => { tip.hidden = true; }));

// the viewer of pictures: original and reconstruction in one place
const frames = all(".frame");
if (frames.length) {
  const dialog = make("dialog", { className: "viewer" });
  const key = make("span", { className: "key mono" }), stage = make("div", { className: "stage" });
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50 });
  slider.setAttribute("aria-label", "position of the border between original and reconstruction");
  const modes = {}, state = { card: null, mode: "slider", timer: 0 };
  const button = (text, title, action) => { const b = make("button", { type: "button", textContent: text, title }); b.addEventListener("click", action); return b; };
  const header = make("header");
  const cardOf = frame => frame.closest("[data-pair]") ?? frame.closest(".pair");
  const cards = () => [...new Set(all(".frame").map(cardOf))].filter(card => card.offsetParent !== null);
  const sourceOf = view => state.card.querySelector(`[data-view="${view}"] img`) ?? (view === "original" && state.card.dataset.pair
    ? document.querySelector(`[data-original="${state.card.dataset.pair}"] img`) : null);
  const copy = (image, className = "") => {
    const one = make("img", { src: image.src, alt: image.alt, className });
    one.style.imageRendering = image.naturalWidth < 400 || className === "pixelated" ? "pixelated" : "";
    return one;
  };
  const label = (text, side) => make("span", { className: `name ${side}`, textContent: text });
  const cut = () => {
    const top = stage.querySelector(".top"), line = stage.querySelector(".cut");
    if (!top || !line) return;
    top.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    line.style.left = `${slider.value}%`;
  };
  const draw = () => {
    clearInterval(state.timer);
    const original = sourceOf("original"), other = sourceOf(state.mode === "error" || state.mode === "tokens" ? state.mode : "reconstruction") ?? sourceOf("reconstruction") ?? original;
    const ratio = original.naturalWidth / original.naturalHeight || 1;
    stage.style.width = `min(100%, ${Math.round(innerHeight * 0.72 * ratio)}px)`;
    const bottom = copy(original), top = copy(other, "top");
    stage.replaceChildren(bottom, top);
    slider.hidden = state.mode !== "slider";
    if (state.mode === "slider") { stage.append(make("div", { className: "cut" }), label("original", "left"), label("reconstruction", "right")); cut(); }
    else if (state.mode === "flicker") {
      const name = label("reconstruction", "left");
      stage.append(name);
      state.timer = setInterval(() => { top.hidden = !top.hidden; name.textContent = top.hidden ? "original" : "reconstruction"; }, 600);
    } else { top.style.imageRendering = state.mode === "tokens" ? "pixelated" : top.style.imageRendering; stage.append(label(state.mode, "left")); }
    for (const [name, b] of Object.entries(modes)) { b.setAttribute("aria-pressed", name === state.mode); b.hidden = !sourceOf(["slider", "flicker"].includes(name) ? "reconstruction" : name); }
    key.textContent = state.card.querySelector(".key")?.textContent ?? state.card.dataset.name ?? "";
  };
  const setMode = mode => { state.mode = mode; draw(); };
  const move = by => { const list = cards(); state.card = list[(list.indexOf(state.card) + by + list.length) % list.length]; draw(); };
  for (const [mode, title] of [["slider", "drag the border (S)"], ["flicker", "change between both (F)"], ["original", "only the original (O)"],
    ["reconstruction", "only the reconstruction (R)"], ["error", "where they differ (E)"], ["tokens", "the tokens (T)"]])
    modes[mode] = button(mode, title, () => setMode(mode));
  header.append(key, ...Object.values(modes), button("←", "previous sample", () => move(-1)), button("→", "next sample", () => move(1)), button("×", "close (Esc)", () => dialog.close()));
  dialog.append(header, stage, make("footer", {}, slider));
  document.body.append(dialog);
  slider.addEventListener("input", cut);
  const drag = event => { if (state.mode !== "slider" || (event.type === "pointermove" && !event.buttons)) return;
    const box = stage.getBoundingClientRect(); slider.value = (event.clientX - box.left) / box.width * 100; cut(); };
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  dialog.addEventListener("close", () => clearInterval(state.timer));
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", event => {
    const mode = Object.keys(modes).find(name => name[0] === event.key.toLowerCase());
    if (mode && !modes[mode].hidden) setMode(mode);
    else if (event.key === "ArrowLeft" && event.target !== slider) move(-1);
    else if (event.key === "ArrowRight" && event.target !== slider) move(1);
  });
  document.addEventListener("click", event => {
    const frame = event.target.closest(".frame");
    if (!frame) return;
    state.card = cardOf(frame);
    state.mode = ["error", "tokens"].includes(frame.dataset.view) ? frame.dataset.view : sourceOf("reconstruction") ? "slider" : "original";
    dialog.showModal();
    draw();
  });
}

// the players of a clip: one control for both, which switches in place
let playing = null;
all(".pair-of-sounds").forEach(clip => {
  const sounds = all("audio", clip);
  if (sounds.length !== 2) return;
  const names = ["original", "reconstruction"], sides = names.map(name => clip.querySelector(`[data-side=${name}]`));
  const state = { now: 0, frame: 0 };
  const play = make("button", { type: "button", textContent: "▶ play" });
  const choose = names.map((name, i) => { const b = make("button", { type: "button", textContent: name }); b.addEventListener("click", () => change(i)); return b; });
  const seek = make("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0 });
  seek.setAttribute("aria-label", "position");
  const clock = make("output", { textContent: "0.0 s" });
  const length = () => sounds[state.now].duration || Number(clip.dataset.seconds) || 0;
  const show = () => {
    const at = sounds[state.now].currentTime, share = length() ? at / length() : 0;
    seek.value = share;
    clock.textContent = `${at.toFixed(1)} / ${length().toFixed(1)} s`;
    all(".head", clip).forEach(head => { head.hidden = false; head.style.left = `${share * 100}%`; });
    sides.forEach((side, i) => side?.classList.toggle("playing", i === state.now && !sounds[i].paused));
    choose.forEach((b, i) => b.setAttribute("aria-pressed", i === state.now));
    play.textContent = sounds[state.now].paused ? "▶ play" : "❚❚ pause";
  };
  const follow = () => { show(); if (!sounds[state.now].paused) state.frame = requestAnimationFrame(follow); };
  const start = () => { if (playing && playing !== clip) playing.pauseClip(); playing = clip; return sounds[state.now].play().then(follow); };
  const change = i => {
    if (i === state.now) return;
    const at = sounds[state.now].currentTime, ran = !sounds[state.now].paused;
    sounds[state.now].pause();
    state.now = i;
    sounds[i].currentTime = at;
    if (ran) start(); else show();
  };
  clip.pauseClip = () => { sounds.forEach(sound => sound.pause()); show(); };
  play.addEventListener("click", () => { if (sounds[state.now].paused) start(); else clip.pauseClip(); });
  const goTo = share => { sounds[state.now].currentTime = share * length(); show(); };
  seek.addEventListener("input", () => goTo(Number(seek.value)));
  all(".seek", clip).forEach((picture, i) => picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect();
    change(i);
    goTo((event.clientX - box.left) / box.width);
  }));
  sounds.forEach(sound => sound.addEventListener("ended", show));
  clip.tabIndex = 0;
  clip.addEventListener("keydown", event => {
    if (event.target.tagName === "BUTTON" && event.key === " ") return;
    if (event.key === " ") { event.preventDefault(); play.click(); }
    else if (event.key === "o") change(0);
    else if (event.key === "r") change(1);
    else if (event.key === "Tab" || event.key.startsWith("Arrow")) return;
  });
  clip.querySelector(".players").hidden = true;
  clip.querySelector(".players").before(make("div", { className: "switcher" }, play, ...choose, seek, clock));
  show();
});

// live: while a run trains, the page takes its changing parts from a small JSON beside it
const live = document.getElementById("live");
if (live?.dataset.running === "true") {
  const seconds = Number(live.dataset.seconds);
  if (location.protocol !== "file:") {
    const refresh = async () => {
      const answer = await fetch(live.dataset.source, { cache: "no-store" }).catch(() => null);
      if (answer?.ok) {
        const news = await answer.json();
        for (const [id, html] of Object.entries(news.parts)) document.getElementById(id).innerHTML = html;
        prepare(live);
        if (!news.running) { location.reload(); return; }
      }
      setTimeout(refresh, seconds * 1000);
    };
    setTimeout(refresh, seconds * 1000);
  } else setTimeout(() => location.reload(), 60 * 1000);  // a page in a folder may read no other file
}
})();
