// Sorts the rows of the index by a column, and shows those that a text, a finding and a verdict select.
(() => {
  "use strict";
  const body = document.querySelector("tbody");
  const rows = [...body.rows].map((row) => ({
    row,
    text: row.textContent.toLowerCase(),
    found: new Map([...row.querySelectorAll("[data-name]")].map((each) => [each.dataset.name, Number(each.dataset.value)])),
    verdict: row.dataset.verdict,
    probability: row.querySelector("[data-value].number"),
    strongest: row.querySelector("[data-value].number").dataset.value,
  }));
  const [text, finding, verdict, count] = ["text", "finding", "verdict", "count"].map((id) => document.getElementById(id));
  const compare = new Intl.Collator("en", { numeric: true, sensitivity: "base" }).compare;

  const percent = (value) => value < 0.005 && value > 0 ? "< 1 %" : value > 0.995 && value < 1 ? "> 99 %" : `${(100 * value).toFixed(0)} %`;
  let sorted = null; // the column that rows are sorted by

  function filter() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const each of rows) {
      const fits = words.every((word) => each.text.includes(word))
        && (!finding.value || each.found.has(finding.value))
        && (!verdict.value || each.verdict === verdict.value);
      each.row.hidden = !fits;
      // The probability is that of the finding asked for, else of the strongest one.
      const value = finding.value ? each.found.get(finding.value) ?? "" : each.strongest;
      each.probability.dataset.value = value;
      each.probability.textContent = value === "" ? "–" : percent(Number(value));
      shown += fits;
    }
    if (sorted) order();
    count.textContent = shown === rows.length ? `${shown} shown` : `${shown} of ${rows.length} shown`;
  }
  function sort(button) {
    const heading = button.closest("th");
    const numbers = button.dataset.kind === "number";
    const before = heading.getAttribute("aria-sort");
    // Numbers are wanted from the highest down, text from A on; then the other way round.
    const down = before === "none" ? numbers : before === "ascending";
    for (const each of document.querySelectorAll("th[aria-sort]")) each.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    sorted = { column: button.dataset.column, numbers, down };
    order();
  }
  function order() {
    const { column, numbers, down } = sorted;
    const value = ({ row }) => {
      const cell = row.cells[column];
      return numbers ? (cell.dataset.value === "" ? null : Number(cell.dataset.value)) : cell.textContent.trim();
    };
    const keyed = rows.map((each) => [value(each), each]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what has no value comes last
      return (down ? -1 : 1) * (numbers ? a - b : compare(a, b));
    });
    body.append(...keyed.map(([, each]) => each.row));
  }
  for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
  for (const input of [text, finding, verdict]) input.addEventListener("input", filter);
  filter();
  document.documentElement.dataset.height = document.documentElement.scrollHeight; // for who takes a picture of it
})();
