# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
#
# A small model of openembedded-core's sstate.bbclass: what it does over the
# network, with the same calls into bb.fetch2 and bitbake's own hooks, but
# one kind of object and no manifests. sstate_fetch() stands for
# pstaging_fetch(), sstate_checkhashes() for the function of that name: one
# datastore copy, PREMIRRORS from SSTATE_MIRRORS, and all files asked for at
# once if bitbake can do that, else with a Fetch for each. It is the same on
# stock and patched trees.

SSTATE_PKGSPEC = "sstate:${PN}:${PACKAGE_ARCH}${TARGET_VENDOR}-${TARGET_OS}:${PV}:${PR}:${PACKAGE_ARCH}:14:"
BB_HASHFILENAME = "False ${SSTATE_PKGSPEC} ${SSTATE_PKGSPEC}"
BB_HASHCHECK_FUNCTION = "sstate_checkhashes"
BB_SETSCENE_DEPVALID = "setscene_depvalid"
SSTATE_MIRRORS ?= ""

def sstate_filename(spec, unihash, taskname):
    return "%s/%s/%s%s_%s.tar.zst" % (unihash[:2], unihash[2:4], spec, unihash, taskname)

def sstate_name(d):
    """Path below SSTATE_DIR of the running task's object."""
    task = d.getVar("BB_CURRENTTASK").replace("_setscene", "")
    return sstate_filename(d.getVar("SSTATE_PKGSPEC"), d.getVar("BB_UNIHASH"), task)

def sstate_mirror_data(d):
    """A datastore in which file:// URLs are looked for in SSTATE_DIR and on the mirrors only."""
    localdata = bb.data.createCopy(d)
    sstatedir = localdata.expand("${SSTATE_DIR}")
    localdata.delVar("MIRRORS")
    localdata.setVar("FILESPATH", sstatedir)
    localdata.setVar("DL_DIR", sstatedir)
    localdata.setVar("PREMIRRORS", d.getVar("SSTATE_MIRRORS"))
    if bb.utils.to_boolean(localdata.getVar("BB_NO_NETWORK")) and \
            bb.utils.to_boolean(localdata.getVar("SSTATE_MIRROR_ALLOW_NETWORK")):
        localdata.delVar("BB_NO_NETWORK")
    return localdata

def sstate_fetch(name, d):
    """Archive, then .siginfo, into SSTATE_DIR. What cannot be had is left out, as upstream does."""
    if not d.getVar("SSTATE_MIRRORS"):
        return
    localdata = sstate_mirror_data(d)
    with bb.utils.umask(int(d.getVar("OE_SHARED_UMASK"), 8)):
        bb.utils.mkdirhier(localdata.getVar("DL_DIR"))
        for filename in (name, name + ".siginfo"):
            uri = "file://%s;downloadfilename=%s" % (filename, filename)
            localdata.setVar("SRC_URI", uri)
            try:
                fetcher = bb.fetch2.Fetch([uri], localdata, cache=False)
                fetcher.checkstatus()
                fetcher.download()
            except bb.fetch2.BBFetchException as error:
                bb.debug(1, "sstate: no %s: %s" % (filename, error))

def sstate_make(content, d):
    """Pack content as the running task's object, with its .siginfo, into SSTATE_DIR."""
    import io, tarfile, zstandard
    archive = d.expand("${SSTATE_DIR}/") + sstate_name(d)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as members:
        member = tarfile.TarInfo("content")
        member.size = len(content)
        member.mode = 0o644
        members.addfile(member, io.BytesIO(content))
    with bb.utils.umask(int(d.getVar("OE_SHARED_UMASK"), 8)):
        bb.utils.mkdirhier(os.path.dirname(archive))
        for path, data in ((archive, tar.getvalue()), (archive + ".siginfo", sstate_siginfo(d))):
            with open(path + ".new", "wb") as output:
                output.write(zstandard.compress(data))
            os.rename(path + ".new", path)

def sstate_siginfo(d):
    """A few KiB about the task's hash, as a real .siginfo is."""
    import hashlib
    lines = ["task %s:%s" % (d.getVar("PN"), d.getVar("BB_CURRENTTASK")),
             "unihash %s" % d.getVar("BB_UNIHASH")]
    for name in sorted(d.keys()):
        if name.isupper() and not name.startswith("BB_"):
            value = str(d.getVar(name, False))
            lines.append("%s %s = %s" % (hashlib.sha256(value.encode()).hexdigest(), name, value))
    return "\n".join(lines).encode()

def sstate_unpack(archive, d):
    """Unpack into RESTOREDIR, and say so if it is not what the recipe's name and size give."""
    import io, shutil, tarfile, zstandard
    expected = netqueue_objects.object_content(d.getVar("PN"), int(d.getVar("DEMO_SIZE")))
    directory = d.expand("${RESTOREDIR}/${PN}")
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with open(archive, "rb") as packed:
            data = zstandard.ZstdDecompressor().stream_reader(packed).read()
        with tarfile.open(fileobj=io.BytesIO(data)) as members:
            content = members.extractfile("content").read()
    except (zstandard.ZstdError, tarfile.TarError, KeyError, EOFError) as error:
        bb.fatal("Corrupt sstate object %s: %s" % (archive, error))
    if content != expected:
        bb.fatal("Corrupt sstate object %s: the content is not that of %s" % (archive, d.getVar("PN")))
    bb.utils.mkdirhier(directory)
    with open(directory + "/content", "wb") as output:
        output.write(content)

def setscene_depvalid(task, taskdependees, notneeded, d, log=None):
    # Every object is wanted, also one that only other objects depend on.
    return False

def sstate_query_mirror(tasklist, d, siginfo, presence):
    """Ask for each (tid, path below SSTATE_DIR). Returns the set of tids that are there."""
    title = "Checking sstate mirror object availability"
    localdata = sstate_mirror_data(d)
    # Stock bitbake passes none, and that of an early patch of the series cannot ask
    if hasattr(presence, "query"):
        sizes = presence.query([(tid, "file://" + name) for tid, name in tasklist], localdata, siginfo, title)
        if sizes is not None:
            if not siginfo and hasattr(presence, "fetchable"):
                files = {tid: (name, name + ".siginfo") for tid, name in tasklist if tid in sizes}
                presence.fetchable(files, int(d.getVar("OE_SHARED_UMASK"), 8),
                                   settings=("SSTATE_DIR", "SSTATE_MIRRORS", "SSTATE_MIRROR_ALLOW_NETWORK", "OE_SHARED_UMASK"))
            return set(sizes)
    return sstate_query_each(tasklist, localdata, title, d)

def sstate_query_each(tasklist, localdata, title, d):
    """As sstate_query_mirror(), with a Fetch for each object."""
    import concurrent.futures, itertools, queue, traceback
    found = set()
    threads = min(int(d.getVar("BB_NUMBER_THREADS")), len(tasklist))
    caches = queue.Queue(threads)
    for _ in range(threads):
        caches.put(bb.fetch2.FetchConnectionCache())
    done = itertools.count(1)       # next() of it is atomic
    progress = len(tasklist) >= 100

    def ask(item):
        tid, name = item
        cache = caches.get()
        data = bb.data.createCopy(localdata)
        uri = "file://" + name
        data.setVar("SRC_URI", uri)
        try:
            bb.fetch2.Fetch([uri], data, connection_cache=cache).checkstatus()
            found.add(tid)
        except bb.fetch2.FetchError as error:
            bb.debug(2, "sstate: %s is not there: %r" % (uri, error))
        except Exception as error:
            bb.error("sstate: cannot ask for %s: %r\n%s" % (uri, error, traceback.format_exc()))
        caches.put(cache)
        if progress:
            bb.event.fire(bb.event.ProcessProgress(title, next(done)), d)
        bb.event.check_for_interrupts()

    if progress:
        bb.event.fire(bb.event.ProcessStarted(title, len(tasklist)), d)
    # Once, outside the threads: the environment belongs to the process.
    with bb.utils.environment(**bb.fetch2.get_fetcher_environment(d)):
        bb.event.enable_threadlock()
        with concurrent.futures.ThreadPoolExecutor(max_workers=threads) as executor:
            executor.map(ask, tasklist)
        while not caches.empty():
            caches.get().close_connections()
        bb.event.disable_threadlock()
    if progress:
        bb.event.fire(bb.event.ProcessFinished(title), d)
    return found

def sstate_checkhashes(sq_data, d, siginfo=False, currentcount=0, summary=True, presence=None, **kwargs):
    """Called by the runqueue: which of these tasks have an object, here or on a mirror?"""
    import time
    found, tasklist = set(), []
    for tid in sq_data["hash"]:
        spec = sq_data["hashfn"][tid].split()[1]
        task = bb.runqueue.taskname_from_tid(tid)[3:]
        name = sstate_filename(spec, sq_data["unihash"][tid], task) + (".siginfo" if siginfo else "")
        if os.path.exists(d.expand("${SSTATE_DIR}/") + name):
            found.add(tid)
        else:
            tasklist.append((tid, name))
    local = len(found)
    if presence is not None and not siginfo:
        presence.local(found)
    if tasklist and d.getVar("SSTATE_MIRRORS"):
        wall, cpu = time.monotonic(), time.process_time()
        found |= sstate_query_mirror(tasklist, d, siginfo, presence)
        # Read by build.py, which sums up the lines of a build.
        bb.plain("Presence query: %d objects, %.3f s, %.3f s CPU"
                 % (len(tasklist), time.monotonic() - wall, time.process_time() - cpu))
    if summary:
        total = len(sq_data["hash"])
        everything = total + currentcount
        bb.plain("Sstate summary: Wanted %d Local %d Mirrors %d Missed %d Current %d (%d%% match, %d%% complete)"
                 % (total, local, len(found) - local, total - len(found), currentcount,
                    100 * len(found) / total if total else 0,
                    100 * (len(found) + currentcount) / everything if everything and currentcount else 0))
    return found
