#!/bin/sh
# Fills a template and prints it: sh deploy/fill.sh TEMPLATE [SETTINGS]
#
# SETTINGS is a file of NAME="VALUE" lines, balancer.env beside this script if not given; a variable of the
# environment comes before a line of it. In a template
#
#   @NAME@                        is the value
#   #@ each NAME in LIST … #@ end is repeated for each word of LIST; of a word A=B, @NAME.key@ is A and @NAME.value@ B;
#                                 of B=HOST:PORT they are @NAME.host@ and @NAME.port@; @NAME.number@ counts from 1
#   #@ if NAME … #@ end           is left out where NAME is empty
#
# A name that has no value at all is an error, so that nothing half filled is ever used.
set -eu
template=$1
settings=${2:-$(dirname "$0")/balancer.env}
exec awk -v settings="$settings" '
function fail(text) { print "fill.sh: " text > "/dev/stderr"; failed = 1; exit 1 }
function value(name, where) {
    if (name in loop) return loop[name]
    if (name in ENVIRON && name in known) return ENVIRON[name]
    if (name in known) return known[name]
    fail(where ": nothing is known of " name)
}
function filled(text, where,    out, name) {
    out = ""
    while (match(text, /@[A-Za-z_.]+@/)) {
        name = substr(text, RSTART + 1, RLENGTH - 2)
        out = out substr(text, 1, RSTART - 1) value(name, where)
        text = substr(text, RSTART + RLENGTH)
    }
    return out text
}
function closing(from,    depth, n) {
    depth = 1
    for (n = from; n <= count; n++) {
        if (line[n] ~ /^[ \t]*#@ (each|if) /) depth++
        if (line[n] ~ /^[ \t]*#@ end/ && --depth == 0) return n
    }
    fail("line " from - 1 ": its #@ end is missing")
}
function render(from, to,    n, part, end, words, total, i, at, name, place) {
    for (n = from; n <= to; n++) {
        if (line[n] !~ /^[ \t]*#@ /) { print filled(line[n], "line " n); continue }
        split(line[n], part, " ")
        end = closing(n + 1)
        if (part[2] != "if" && part[2] != "each") fail("line " n ": each, if or end belongs after #@")
        if (part[2] == "if" && value(part[3], "line " n) != "") render(n + 1, end - 1)
        if (part[2] == "each") {
            name = part[3]
            total = split(value(part[5], "line " n), words, " ")
            for (i = 1; i <= total; i++) {
                at = index(words[i], "=")
                loop[name] = words[i]
                loop[name ".number"] = i
                loop[name ".key"] = at ? substr(words[i], 1, at - 1) : words[i]
                loop[name ".value"] = at ? substr(words[i], at + 1) : words[i]
                split(loop[name ".value"], place, ":")
                loop[name ".host"] = place[1]
                loop[name ".port"] = place[2]
                render(n + 1, end - 1)
            }
        }
        n = end
    }
}
BEGIN {
    while ((getline text < settings) > 0) {
        if (text !~ /^[A-Z_]+=/) continue
        at = index(text, "=")
        name = substr(text, 1, at - 1)
        text = substr(text, at + 1)
        gsub(/^"|"$/, "", text)
        known[name] = text
    }
    if (length(known) == 0) fail("cannot read settings from " settings)
}
{ line[++count] = $0 }
END { if (!failed) render(1, count) }
' "$template"
