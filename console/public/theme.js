// Runs before the first paint, so that a chosen theme does not flash. Kept out of the page for the content policy.
try {
  var theme = localStorage.getItem('fieldline.theme');
  if (theme === 'dark' || theme === 'light') document.documentElement.dataset.theme = theme;
} catch (_) {
  // Without storage the system's theme holds.
}
