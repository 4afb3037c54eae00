#!/usr/bin/env bash
# A Chromium without a window, into the folder $1, for tests/monitoring/test_report_browser.py: 70 MB from npm, where a
# package holds the program itself. Where there is no npm, or no network, it says so and makes nothing: that test is then
# skipped, unless a browser is on PATH.
set -euo pipefail
version=153.0.0
folder=$1 partial=$1.partial
if [ "$(uname -sm)" != "Linux x86_64" ] || ! command -v npm >/dev/null || ! command -v node >/dev/null; then
	echo "browser: expected npm and node on Linux x86_64, to fetch a Chromium; the report is not looked at in one"
	exit 0
fi
rm -rf "$folder" "$partial" && mkdir -p "$partial" && cd "$partial"
if ! npm pack --silent "@sparticuz/chromium@$version" >/dev/null; then
	echo "browser: npm did not bring @sparticuz/chromium; the report is not looked at in a browser"
	cd / && rm -rf "$partial"
	exit 0
fi
tar xzf ./*.tgz package/bin
node -e '
const { brotliDecompressSync } = require("zlib"), { readFileSync, writeFileSync } = require("fs");
for (const name of ["chromium", "al2023.tar", "fonts.tar"])
  writeFileSync(name, brotliDecompressSync(readFileSync(`package/bin/${name}.br`)));'
tar xf al2023.tar && tar xf fonts.tar fonts
cat >fonts.conf <<'XML'
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><dir>/usr/share/fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
XML
rm -rf package ./*.tgz ./*.tar
chmod +x chromium
cd - >/dev/null && mv "$partial" "$folder" && touch "$folder"
