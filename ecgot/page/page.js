// Evidence on the trace: a finding lights up where it is read from, a stretch lights up what is read from it.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const FAINT = 8; // of 100: weaker shares are not drawn
  const DRAWS = 40; // of 100: a finding draws on a stretch whose share is at least this of its strongest one
  const data = JSON.parse(document.getElementById("data").textContent);
  const application = document.querySelector(".sheets");
  const readout = document.querySelector(".readout");
  const buttons = [...document.querySelectorAll("button[data-finding]")];
  const sheets = [...document.querySelectorAll("svg.sheet")].map((svg) => ({ svg, light: svg.querySelector(".light"), ...data.sheets[svg.dataset.sheet] }));
  let pinned = data.first || null; // a finding that stays lit
  let pointed = null; // {finding}, or {sheet, piece, cell}, while something is pointed at
  let cursor = null; // the stretch that the arrow keys are at

  // --- geometry: a piece is [lead, x, top, height, start, stop] ---
  const edges = (Object.values(data.findings)[0] || { edges: [] }).edges;
  const cells = Math.max(0, edges.length - 1);
  const visible = () => sheets.filter((sheet) => !sheet.svg.hasAttribute("hidden"));
  const atX = (piece, time) => piece[1] + data.mmPerS * (time - piece[4]);
  const part = (piece, cell) => [Math.max(piece[4], edges[cell]), Math.min(piece[5], edges[cell + 1])];
  const cellAt = (time) => Math.min(cells - 1, Math.max(0, edges.findLastIndex((edge) => edge <= time + 1e-9)));

  const reaches = (piece, cell) => part(piece, cell)[1] - part(piece, cell)[0] > 1e-6;

  function rect(parent, x, y, width, height, kind, opacity) {
    const made = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries({ x, y, width, height, class: kind })) made.setAttribute(name, value);
    if (opacity !== undefined) made.setAttribute("opacity", opacity.toFixed(3));
    parent.append(made);
  }
  function shade(sheet, piece, cell, share, y, height) {
    const [from, to] = part(piece, cell);
    if (!reaches(piece, cell) || Math.abs(share) < FAINT) return;
    rect(sheet.light, atX(piece, from), y, data.mmPerS * (to - from), height, share > 0 ? "for" : "against", 0.05 + 0.65 * (Math.abs(share) / 100) ** 1.4);
  }

  // --- what is lit ---
  function lightFinding(name) {
    const finding = data.findings[name];
    for (const sheet of visible()) {
      for (const piece of sheet.pieces) {
        const shares = finding.leads[piece[0]];
        if (shares) shares.forEach((share, cell) => shade(sheet, piece, cell, share, piece[2] + 0.6, piece[3] - 1.2));
      }
      const whole = ["", data.pulse, 0, 0, sheet.start, sheet.stop];
      finding.time.forEach((share, cell) => shade(sheet, whole, cell, share, sheet.lane, 2));
    }
    for (const button of buttons) button.classList.toggle("lit", button.dataset.finding === name);
    return describe(finding);
  }
  function describe(finding) {
    const best = finding.peak;
    const sums = Object.entries(finding.leads).map(([lead, shares]) => [lead, shares.reduce((sum, share) => sum + share, 0)]);
    const leads = sums.filter(([, sum]) => sum > 0).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([lead]) => lead);
    const where = leads.length ? ` and from ${leads.join(", ")}` : "";
    const hidden = leads.length && !visible().some((sheet) => sheet.pieces.some((piece) => piece[0] === leads[0] && reaches(piece, best)));
    const more = hidden ? ` ${leads[0]} at this time is on “All leads”.` : "";
    const against = Object.values(finding.leads).some((shares) => shares.some((share) => share <= -FAINT));
    return `${capital(finding.name)} (${finding.code}): read most from ${span(best)}${where}.${more}${against ? " Blue speaks against it." : ""}`;
  }
  function lightStretch({ sheet, piece, cell }) {
    const [from, to] = part(piece, cell);
    for (const each of visible()) for (const other of each.pieces) {
      const [start, stop] = part(other, cell);
      if (reaches(other, cell)) rect(each.light, atX(other, start), other[2] + 0.6, data.mmPerS * (stop - start), other[3] - 1.2, "moment");
    }
    rect(sheet.light, atX(piece, from), piece[2] + 0.6, data.mmPerS * (to - from), piece[3] - 1.2, "cursor");
    const drawing = drawn(piece[0], cell);
    const strength = new Map(drawing);
    for (const button of buttons) {
      const share = strength.get(button.dataset.finding);
      button.classList.toggle("draws", share !== undefined);
      if (share !== undefined) button.style.setProperty("--draws", share / 100);
    }
    const names = drawing.map(([name]) => data.findings[name].name);
    return `${piece[0]}, ${span(cell)}: ${names.length ? names.join("; ") : "no finding draws on it"}.`;
  }
  function drawn(lead, cell) {
    return Object.entries(data.findings)
      .map(([name, finding]) => [name, (finding.leads[lead] || [])[cell] || 0])
      .filter(([, share]) => share >= DRAWS)
      .sort((a, b) => b[1] - a[1]);
  }
  const span = (cell) => `${edges[cell].toFixed(1)} to ${edges[cell + 1].toFixed(1)} s`;
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  function render() {
    for (const sheet of sheets) sheet.light.replaceChildren();
    for (const button of buttons) {
      button.classList.remove("lit", "draws");
      button.setAttribute("aria-pressed", button.dataset.finding === pinned);
    }
    const name = pointed && pointed.finding ? pointed.finding : pinned;
    let text = name ? lightFinding(name) : "";
    if (pointed && pointed.piece) text = lightStretch(pointed);
    if (readout && readout.textContent !== text) readout.textContent = text;
  }
  const point = (what) => { pointed = what; render(); };
  const pin = (name) => { pinned = pinned === name ? null : name; render(); };
  function clear() { pinned = pointed = cursor = null; render(); }

  // --- findings and sentences ---
  for (const button of buttons) {
    const finding = button.dataset.finding;
    button.addEventListener("pointerenter", (event) => { if (event.pointerType !== "touch") point({ finding }); });
    button.addEventListener("pointerleave", () => { if (document.activeElement !== button) point(null); });
    button.addEventListener("focus", () => { if (button.matches(":focus-visible")) point({ finding }); });
    button.addEventListener("blur", () => point(null));
    button.addEventListener("click", () => pin(finding));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const shown = buttons.filter((each) => each.closest("section") === button.closest("section") && each.offsetParent);
      const next = shown[shown.indexOf(button) + step];
      event.preventDefault();
      if (next) next.focus();
    });
  }

  // --- the trace ---
  function found(event) {
    const sheet = sheets.find((each) => each.svg === event.target.closest("svg.sheet"));
    if (!sheet || !cells) return null;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(sheet.svg.getScreenCTM().inverse());
    const piece = sheet.pieces.find((each) => at.y >= each[2] && at.y < each[2] + each[3] && at.x >= each[1] && at.x < atX(each, each[5]));
    return piece ? { sheet, piece, cell: cellAt(piece[4] + (at.x - piece[1]) / data.mmPerS) } : null;
  }
  function moved(key) {
    const { sheet, piece, cell } = cursor;
    const rows = [...new Set(sheet.pieces.map((each) => each[2]))];
    const row = sheet.pieces.filter((each) => each[2] === piece[2]);
    const [from, to] = part(piece, cell);
    if (key === "ArrowRight" || key === "ArrowLeft") {
      const step = key === "ArrowRight" ? 1 : -1;
      const next = cell + step;
      if (next >= 0 && next < cells && reaches(piece, next)) return { sheet, piece, cell: next };
      const beside = row[row.indexOf(piece) + step];
      return beside ? { sheet, piece: beside, cell: cellAt(step > 0 ? beside[4] : beside[5] - 1e-6) } : cursor;
    }
    const top = rows[rows.indexOf(piece[2]) + (key === "ArrowDown" ? 1 : -1)];
    const x = atX(piece, (from + to) / 2);
    const below = sheet.pieces.find((each) => each[2] === top && x >= each[1] && x < atX(each, each[5]));
    return below ? { sheet, piece: below, cell: cellAt(below[4] + (x - below[1]) / data.mmPerS) } : cursor;
  }
  if (application) {
    application.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") point(found(event)); });
    application.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") point(null); });
    application.addEventListener("click", (event) => { cursor = found(event); point(cursor); });
    const begin = () => {
      const sheet = visible()[0];
      cursor = cursor || { sheet, piece: sheet.pieces[0], cell: cellAt(sheet.start) };
      point(cursor);
    };
    application.addEventListener("focus", () => { if (cells && application.matches(":focus-visible")) begin(); });
    application.addEventListener("blur", () => point(null));
    application.addEventListener("keydown", (event) => {
      if (!cells) return;
      if (event.key.startsWith("Arrow")) {
        event.preventDefault();
        if (cursor) cursor = moved(event.key);
        begin();
      } else if (event.key === "Enter" && cursor) {
        const strongest = drawn(cursor.piece[0], cursor.cell)[0];
        if (strongest) pin(strongest[0]);
      }
    });
  }

  // --- the page ---
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });
  for (const choice of document.querySelectorAll("button[data-view]")) choice.addEventListener("click", () => {
    for (const sheet of sheets) sheet.svg.toggleAttribute("hidden", !sheet.svg.classList.contains(choice.dataset.view));
    for (const each of document.querySelectorAll("button[data-view]")) each.setAttribute("aria-pressed", each === choice);
    cursor = null;
    point(null);
  });
  render();
  document.documentElement.dataset.height = document.documentElement.scrollHeight; // for who takes a picture of it
})();
