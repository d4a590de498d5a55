#
# Tasks that log when they start and end, to count how many there are at the
# same time. A task in PAIRTASKS ends when another one of PAIRTASKS has started,
# and one in WAITTASKS, a list of task=other, when a task of that other name has
# started, or after some seconds; the others stay for a moment. Tasks in
# FAILTASKS fail.
#

PAIRTASKS ??= ""
WAITTASKS ??= ""
FAILTASKS ??= ""

def spanlog(d, what):
    line = "%s %s\n" % (what, d.expand("${BB_CURRENT_MC}:${PN}:${BB_CURRENTTASK}"))
    # One write with O_APPEND is atomic
    fd = os.open(d.expand("${TOPDIR}/span.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, line.encode())
    os.close(fd)

python span_start() {
    import time

    spanlog(d, "start")
    if d.expand("${PN}:${BB_CURRENTTASK}") in d.getVar("FAILTASKS").split():
        raise bb.BBHandledException()
    pairtasks = d.getVar("PAIRTASKS").split()
    waittask = dict(pair.split("=") for pair in d.getVar("WAITTASKS").split()).get(d.getVar("BB_CURRENTTASK"))
    if d.getVar("BB_CURRENTTASK") not in pairtasks and not waittask:
        time.sleep(0.2)
        return

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with open(d.expand("${TOPDIR}/span.log")) as f:
            started = [line.split(":")[-1].strip() for line in f if line.startswith("start")]
        if waittask in started or len([task for task in started if task in pairtasks]) > 1:
            return
        time.sleep(0.05)
}

python span_end() {
    spanlog(d, "end")
}

SPANTASKS = "fetch unpack package populate_sysroot package_setscene populate_sysroot_setscene packagedata_setscene"

python () {
    for task in d.getVar("SPANTASKS").split():
        d.appendVarFlag("do_" + task, "prefuncs", " span_start")
        d.appendVarFlag("do_" + task, "postfuncs", " span_end")
}

# As in openembedded-core
do_fetch[network] = "1"
do_unpack[network] = "0"
do_package[network] = "1"
do_package_setscene[network] = "1"
do_populate_sysroot[network] = "1"
do_populate_sysroot_setscene[network] = "1"
