inherit network

python do_late() {
    stamptask(d)
}
addtask late
do_late[depends] = "n4:do_packagedata"
SPANTASKS += "late"
