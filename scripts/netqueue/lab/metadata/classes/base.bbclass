# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
#
# The tasks of a recipe of the demo: do_populate makes an object and packs it
# into SSTATE_DIR, do_populate_setscene restores it instead, do_build is the
# target. A recipe sets DEMO_SIZE (bytes) and DEPENDS.

inherit demo-sstate

DEMO_SIZE ?= "4096"

addtask populate
addtask populate_setscene
addtask build after do_populate

do_populate[deptask] = "do_populate"
do_populate[dirs] = "${WORKDIR}"
do_populate_setscene[dirs] = "${TMPDIR_MC}"
# As openembedded-core's sstate.bbclass: restoring needs the network. Making does not here.
do_populate_setscene[network] = "1"
do_build[noexec] = "1"
do_build[deptask] = "do_populate"

python do_populate() {
    content = netqueue_objects.object_content(d.getVar("PN"), int(d.getVar("DEMO_SIZE")))
    sstate_make(content, d)
}
do_populate[vardepsexclude] += "SSTATE_DIR"

python do_populate_setscene() {
    archive = d.expand("${SSTATE_DIR}/") + sstate_name(d)
    if not os.path.exists(archive):
        sstate_fetch(sstate_name(d), d)
    if not os.path.exists(archive):
        # The words are those of openembedded-core's class: tests and people look for them.
        bb.warn("No sstate archive obtainable, will run full task instead.")
        raise bb.BBHandledException()
    sstate_unpack(archive, d)
}

addhandler demo_summary
demo_summary[eventmask] = "bb.runqueue.sceneQueueTaskFailed"
python demo_summary() {
    bb.plain("Setscene task failed: %s" % e.taskstring)
}
