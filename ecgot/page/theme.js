// The theme button: the other one of light and dark, kept for the next page.
(() => {
  const root = document.documentElement;
  const kept = {
    get() { try { return localStorage.getItem("ecgot-theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("ecgot-theme", theme); } catch { /* a frame may not keep any */ } },
  };
  const theme = kept.get();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  document.querySelector("button.theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    kept.set(root.dataset.theme);
  });
})();
