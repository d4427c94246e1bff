// Formulae, and the columns of wide tables that stay in sight. No network is used.
document.querySelectorAll(".arithmatex").forEach((box) => {
  const source = box.textContent.trim();
  const displayMode = source.startsWith("\\[") || source.startsWith("\\begin");
  katex.render(source.replace(/^\\[[(]|\\[\])]$/g, ""), box, { displayMode, throwOnError: false });
});

const NAMES = ["method", "model", "variant"];
function stick(table) {
  const head = [...(table.tHead?.rows[0]?.cells ?? [])].map((c) => c.textContent.trim());
  const method = head.findIndex((title) => NAMES.includes(title));
  if (head.length < 4) return; // prose, not data
  table.dataset.wide = "";
  const narrow = table.ownerDocument.documentElement.clientWidth < 700;
  const first = narrow && method > 0 ? method : 0;
  for (const row of table.rows) {
    let left = 0;
    for (const [i, cell] of [...row.cells].entries()) {
      const sticks = i >= first && i <= Math.max(method, 0);
      cell.toggleAttribute("data-sticky", sticks);
      cell.style.left = sticks ? `${left}px` : "";
      if (sticks) left += cell.offsetWidth;
    }
  }
}
const tables = () => document.querySelectorAll(".md-typeset table:not([class])").forEach(stick);
addEventListener("load", tables);
addEventListener("resize", tables);
